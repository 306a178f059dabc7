"""
Contract of methods that look at the image first and answer second.

They act through ``patch.answer(image, prompt)``. A method of the common shape, `LookAgain`, is three steps that can be
exchanged for those of another (see ``refine``): a map of what matters (`LookAgain.saliency`), a picture made with it
(`LookAgain.refined`), and which pictures the second answer is given (`LookAgain.shown`). Others answer as they like
with what a `Look` offers. The engine runs the passes, reads attention and gradients, and reads once what passes share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.answering import AnswerMethod, Ask, Reply
from lmmhooks.methods.refinement.saliency import Saliency

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lmmhooks.geometry import Geometry

__all__ = ["Look", "LookAgain", "RefinementMethod", "Seen", "layers_that_exist", "neutral_prompt"]

#: What papers of this kind ask to see what attracts attention whatever the question is.
NEUTRAL = "Write a general description of the image."
#: What their benchmarks put behind every question, and they behind the neutral one too.
SHORT_ANSWER = "Answer the question using a single word or phrase."


@dataclass(frozen=True, eq=False)
class Seen:
    """
    A reply, and where the model looked on the way.

    Attributes
    ----------
    reply
        What it said.
    rows
        float32 ``[T, L, H, n]`` on the CPU: attention that the query which predicts token t pays to the n visual tokens
        of the image, in the layers the method reads (ascending) and every head; after the softmax over all keys, not
        renormalised. Query 0 is the last position of the prompt.
    prompt_length
        Positions of the prompt; the query of step t sees that many keys and t more.
    """

    reply: Reply
    rows: Tensor
    prompt_length: int = 0


class Look(Ask, Protocol):
    """One image in front of the model, as a method may use it; passes of one prompt share what they have in common."""

    image: Image
    """RGB, as given."""
    prompt: str
    family: Any
    region: tuple[float, float, float, float] | None
    """Left, top, right, bottom in pixels of the image: where the caller points; None where nobody does."""

    @property
    def geometry(self) -> Geometry:
        """Where the visual tokens of the image lie in it."""
        ...

    @property
    def mean_color(self) -> tuple[int, int, int]:
        """The mean colour that the image processor subtracts, 0 to 255, rounded down: what padding is made of."""
        ...

    def token(self, word: str) -> int:
        """
        The id of a word, written as it stands in an answer.

        Raises
        ------
        PromptError
            It is not one token.
        """
        ...

    def at(self, image: Image) -> Look:
        """The same model in front of another RGB image, a tile of this one say, with the same prompt and memory."""
        ...

    def watch(self, prompt: str, *, max_new_tokens: int) -> Seen:
        """Answer greedily and read attention in the layers of `RefinementMethod.layers`."""
        ...

    def gradient(self, prompt: str, layer: int) -> tuple[Tensor, Tensor]:
        """
        How the likelihood of the most likely first token hangs on attention.

        Returns
        -------
        tuple
            ``[H, n]`` float32: attention of the last prompt position to the visual tokens of the image in ``layer``,
            and the derivative of the log-probability with respect to it. Exact, by one token's backward pass; other
            methods on the model do not act in it. The layer must be one of `RefinementMethod.gradient_layers`.
        """
        ...

    def pixel_gradient(self, prompt: str) -> list[Tensor]:
        """Derivative of that log-probability by the pixels the encoder takes: per crop or frame ``[C, h, w]``."""
        ...

    def steer(self, prompt: str, layers: Sequence[int], offset: Tensor) -> Tensor:
        """
        Attention under an offset on the image's embeddings, with its graph.

        Parameters
        ----------
        prompt
            The question.
        layers
            Of those in `RefinementMethod.gradient_layers`.
        offset
            ``[n, D]`` added to the embeddings of the visual tokens.

        Returns
        -------
        Tensor
            ``[L, H, R, n]`` attention of the text positions after the image, differentiable with respect to ``offset``.
        """
        ...

    def matrices(self, prompt: str, reply: Sequence[int], fold: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """
        Whole attention matrices of a prompt and a reply to it, all layers; other methods do not act in it.

        Parameters
        ----------
        prompt
            The question.
        reply
            Token ids behind it; they are the last positions.
        fold
            What is made of the attention ``[N, N]`` of each head, float32.

        Returns
        -------
        folded : Tensor
            float32 ``[L, N, N]`` on the CPU, mean over heads; memory grows with N squared. All layers must be among
            `RefinementMethod.gradient_layers`.
        positions : Tensor
            Long ``[n]``: where the visual tokens of the image stand.
        """
        ...

    def score(self, prompt: str | Sequence[str], images: Sequence[Image] | None = None) -> Tensor:
        """Raw logits ``[vocabulary]`` float32 of the first token of an answer; images None: the one in front of it."""
        ...

    def tell(
        self,
        prompt: str | Sequence[str],
        images: Sequence[Image] | None = None,
        *,
        offset: Tensor | None = None,
        turns: Sequence[tuple[str, str]] = (),
        images_kwargs: Mapping[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> Reply:
        """
        Answer under the caller's generation settings.

        Parameters
        ----------
        prompt
            The question; or several texts, one behind each image.
        images
            What it is asked about, in order; None: the image in front of the model; empty: no image.
        offset
            ``[n, D]`` added to the embeddings of the visual tokens of the first image.
        turns
            What was said before: questions without image, and their replies.
        images_kwargs
            Settings of the image processor in the place of its own, such as ``size``.
        **generate_kwargs
            Passed to ``model.generate``.
        """
        ...


@dataclass(frozen=True)
class RefinementMethod(AnswerMethod):
    """Looks at an image before it answers; a method subclasses it and sets ``id``."""

    kind: ClassVar[str] = "refinement"

    @property
    def needs_region(self) -> bool:
        """Whether it answers only where the caller says where to look; others look for themselves."""
        return False

    def layers(self, family: Any) -> tuple[int, ...]:
        """Decoder layers whose attention `Look.watch` reads, 0-based, ascending."""
        return ()

    def gradient_layers(self, family: Any) -> tuple[int, ...]:
        """Decoder layers that `Look.gradient` and `Look.steer` are asked about."""
        return ()

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class LookAgain(RefinementMethod):
    """
    The common shape: a map, a picture made with it, a second answer.

    A map of no mass, and one that is as flat as `min_spread`, says nothing about where to look: the image is then
    answered as it is.
    """

    geometry: str = setting(
        "true",
        help="'true': cells where the model sees them; 'official': the map is stretched over the image, as in released "
        "code, whatever was cropped or padded.",
    )
    show: str = setting("both", help="Pictures of the second answer: 'both', the image and the new one, or 'refined'.")
    min_spread: float = setting(
        0.0, help="Standard deviation over mean of the map, 0 or more, up to which the image is answered as it is."
    )

    def __post_init__(self) -> None:
        self._require(self.geometry in ("true", "official"), "geometry", "'true' or 'official'")
        self._require(self.show in ("both", "refined"), "show", "'both' or 'refined'")
        self._require(self.min_spread >= 0, "min_spread", "0 or more")

    # -- the three steps ----------------------------------------------------------------------------------------------

    def saliency(self, look: Look) -> Saliency:
        """What matters where."""
        raise NotImplementedError

    def refined(self, image: Image, saliency: Saliency) -> Image:
        """The picture made with it; the image itself where there is nothing to do."""
        raise NotImplementedError

    def shown(self, image: Image, refined: Image) -> list[Image]:
        """What the second answer is about, in order."""
        return [image, refined] if self.show == "both" else [refined]

    def question(self, prompt: str) -> str:
        """How the second answer is asked for."""
        return prompt

    # -- together -----------------------------------------------------------------------------------------------------

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """The answer about the pictures, or about the image where the map says nothing."""
        look: Look = ask  # type: ignore[assignment] # what the engine gives to methods of this kind
        saliency = self.saliency(look)
        if saliency.spread <= self.min_spread:
            return look.tell(prompt, **generate_kwargs).text
        refined = self.refined(look.image, saliency)
        return look.tell(self.question(prompt), self.shown(look.image, refined), **generate_kwargs).text

    def _placed(self, look: Look, values: Tensor) -> Saliency:
        """A value per visual token, in the geometry that was chosen."""
        geometry = look.geometry if self.geometry == "true" else look.geometry.stretched()
        return Saliency(values, geometry)


def neutral_prompt(prompt: str, neutral: str = NEUTRAL, suffix: str = SHORT_ANSWER) -> str:
    """A question about nothing in particular, followed by ``suffix`` where the prompt ends with that."""
    return f"{neutral} {suffix}" if suffix and prompt.rstrip().endswith(suffix) else neutral


def layers_that_exist(wanted: Sequence[int], family: Any) -> tuple[int, ...]:
    """Of some layers those that the decoder has."""
    return tuple(sorted(layer for layer in set(wanted) if layer < family.num_layers))
