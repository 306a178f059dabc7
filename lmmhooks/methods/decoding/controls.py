"""What controls of another decoding method have in common: they name it, and read everything they keep off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method, setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import token_ids
from lmmhooks.methods.decoding.view import StepView
from lmmhooks.methods.words import answer_ids

__all__ = ["AnswerControl", "ControlOf", "word_ids"]


@dataclass(frozen=True)
class ControlOf(DecodingMethod):
    """
    Keeps the formula of another method (weights, gates, plausibility cut) and changes what its branches say.

    `of` is kept as a specification, so that it is part of what identifies an answer.
    """

    of: str = setting("vcd", help="The method whose control this is, as a specification such as 'vcd(alpha=0.5)'.")
    beta: float = field(default=0.0, init=False)
    lazy: bool = field(default=False, init=False)

    paper: ClassVar[str] = "none; control"

    def __post_init__(self) -> None:
        # Imported here: reading a specification means finding all methods, this one among them.
        from lmmhooks.methods.registry import resolve

        method: Method = resolve(self.of)
        if not isinstance(method, DecodingMethod) or isinstance(method, ControlOf):
            raise MethodError(
                f"{self.id}: of={self.of!r} is no decoding method with branches; `lmmhooks methods --kind decoding` "
                "lists them"
            )
        object.__setattr__(self, "of", method.spec())
        object.__setattr__(self, "_method", method)
        super().__post_init__()

    @property
    def method(self) -> DecodingMethod:
        """The method whose control this is."""
        method: DecodingMethod = self._method  # type: ignore[attr-defined]
        return method

    @property
    def is_identity(self) -> bool:
        return self.method.is_identity

    def check(self, family: Any) -> None:
        self.method.check(family)
        if not self.method.branches(family):
            raise MethodError(f"{self.id}: of={self.of!r} has no branches with these settings; name a method that has")

    def bind(self, family: Any) -> Method:
        method = self.method
        published = {k: v for k, v in method.defaults_for(family).items() if getattr(method, k) is None}
        bound: Method = replace(method, **published).bind(family)
        return replace(self, of=bound.spec())

    def keep(self, main: Tensor) -> Tensor | None:
        return self.method.keep(main)

    def reads(self, family: Any) -> Sequence[int]:
        return self.method.reads(family)

    def reads_attention(self, family: Any) -> Sequence[int]:
        return self.method.reads_attention(family)

    def reads_image(self, family: Any) -> Sequence[int]:
        return self.method.reads_image(family)

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        self.method.select_rows(rows, memory)

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        return self.method.combine(main, others, step, view)

    def shown(self, family: Any, image: str) -> list[Branch]:
        """The branches of the method, all of them reading the prompt as given and showing the same kind of image."""
        return [Branch(branch.name, image=image) for branch in self.method.branches(family)]


@dataclass(frozen=True)
class AnswerControl(DecodingMethod):
    """Acts on how likely "Yes" is, with no branch at all."""

    yes: str | int = setting(
        "Yes", help="The affirmative answer: a word (needs the processor), or the id of its token."
    )
    beta: float = field(default=0.0, init=False)
    lazy: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_word("yes")

    @property
    def needs_tokenizer(self) -> bool:
        return any(isinstance(getattr(self, name, None), str) for name in ("yes", "no"))

    def _require_word(self, name: str) -> None:
        value = getattr(self, name)
        word = isinstance(value, str) and bool(value.strip())
        self._require(word or (isinstance(value, int) and value >= 0), name, "a word, or a token id of 0 or more")


def word_ids(method: Method, word: str | int, view: StepView) -> list[int]:
    """Tokens with which an answer of one word may begin, see `lmmhooks.methods.words.answer_ids`."""
    if isinstance(word, int):
        return [word]
    known: dict[str, list[int]] = view.memory.setdefault("word_ids", {})
    if word not in known:
        known[word] = answer_ids(partial(token_ids, method, processor=view.processor), word)
    return known[word]
