"""
Contract of methods that put one answer together from several generations of the same model.

They act through ``patch.answer(image, prompt)``: a method says what to ask and what to make of the replies, the engine
builds the prompts, runs them as one batch and draws the random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lmmhooks.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AnswerMethod", "Ask", "Draw", "Reply"]


@dataclass(frozen=True)
class Draw:
    """
    How tokens are drawn; every reply draws from numbers of its own, whatever else is asked beside it.

    Attributes
    ----------
    temperature
        Above 0; 0 takes the most likely token.
    top_p
        In (0, 1]: smallest set of tokens with that much probability.
    seed
        Of the numbers, together with the image, the prompt and the start of the reply.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Reply:
    """
    What the model said.

    Attributes
    ----------
    tokens
        New ids, up to and including the end token; what the reply was made to start with is not among them.
    pieces
        The text each of them adds; empty for special tokens.
    logits
        ``[tokens, vocabulary]`` float32, raw: before any processor or temperature.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    logits: Tensor

    @property
    def text(self) -> str:
        """All pieces, stripped."""
        return "".join(self.pieces).strip()


class Ask(Protocol):
    """Runs the model on an image, under whatever other methods it is wrapped with."""

    memory: dict[Any, Any]
    """Private to the method; lasts as long as the patch."""
    unspeakable: tuple[int, ...]
    """Ids that stand for images and never for text: no reply holds them, and none may be made to start with one."""

    def __call__(
        self,
        image: Any,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        starts: Sequence[int] | None = None,
        draw: Draw | None = None,
        **generate_kwargs: Any,
    ) -> list[Reply]:
        """
        Replies to several prompts about one image, as one batch.

        Parameters
        ----------
        image
            As in ``patch.answer``.
        prompts
            Questions as plain text.
        max_new_tokens
            Longest reply.
        starts
            A token per prompt that its reply is made to start with.
        draw
            None: the most likely tokens.
        **generate_kwargs
            Passed to ``model.generate``.
        """
        ...

    def digest(self, image: Any) -> bytes:
        """A short name of the image (or images) by its pixels, to remember things about it."""
        ...

    def decode(self, token: int) -> str:
        """The text of one token alone, stripped."""
        ...


@dataclass(frozen=True)
class AnswerMethod(Method):
    """Answers a prompt by asking several times; a method subclasses it and sets ``id``."""

    kind: ClassVar[str] = "decoding"

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """
        Answer a question.

        Parameters
        ----------
        ask
            Runs the model.
        image
            A PIL image, a path, or a sequence of them; never None: prompts without image are answered by the model.
        prompt
            The question as plain text.
        **generate_kwargs
            Of ``patch.answer``.
        """
        raise NotImplementedError
