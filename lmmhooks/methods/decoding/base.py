"""
Contract of decoding methods: branches beside the model's own, and how their logits are combined.

One formula serves all of them (per row and step): ``S = sum_i w_i L_i``; tokens whose raw main logit lies below
``max L_0 + log(beta)`` become -inf; then the ordinary processors and warpers of ``generate``. A method names its
branches, says what is different in each (pixels, visual tokens, text) and gives the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import Method, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from lmmhooks.methods.decoding.context import BranchContext
    from lmmhooks.methods.decoding.view import BranchAttention, ImageView, StepView
    from lmmhooks.methods.probe import Probe

__all__ = ["Branch", "DecodingMethod", "contrast", "cut", "plausible"]

IMAGES = ("same", "pixels", "features", "replaced", "none")
TEXTS = ("same", "edited")


def plausible(main: Tensor, beta: float) -> Tensor | None:
    """
    Tokens that pass the adaptive plausibility constraint.

    Parameters
    ----------
    main
        Raw float32 logits ``[..., vocabulary]`` of the main branch, before any processor or temperature.
    beta
        In [0, 1]: smallest probability allowed, relative to the largest of the row. 1 keeps the argmax and its ties.

    Returns
    -------
    Tensor or None
        Bool like ``main``; never all False in a row. None for ``beta=0``, which drops nothing.
    """
    if beta == 0:
        return None
    return main >= main.amax(dim=-1, keepdim=True) + math.log(beta)


def cut(keep: Tensor | None, view: StepView | None) -> Tensor | None:
    """
    The tokens outside of which scores become -inf: ``keep``, or None where a view wants scores as they are before.

    Every `DecodingMethod.combine` asks here last, so that what a method says of tokens it drops can be seen too: how
    sure it is of an answer cannot be told from scores most of which are -inf.

    Parameters
    ----------
    keep
        Bool ``[B, vocabulary]``, or None for all.
    view
        Of the step; None where nothing is known of it but logits.
    """
    return keep if view is None or view.cuts else None


def contrast(logits: Sequence[Tensor], weights: Sequence[float | Tensor], keep: Tensor | None) -> Tensor:
    """
    ``sum_i w_i L_i`` where ``keep`` holds, -inf elsewhere.

    Parameters
    ----------
    logits
        Per branch, main first, float32 ``[B, vocabulary]``.
    weights
        As many numbers or ``[B, 1]`` tensors.
    keep
        Bool ``[B, vocabulary]``, or None for all.
    """
    scores = weights[0] * logits[0]
    for weight, other in zip(weights[1:], logits[1:], strict=True):
        scores = scores + weight * other
    return scores if keep is None else scores.masked_fill(~keep, -math.inf)


@dataclass(frozen=True)
class Branch:
    """
    A second reading of the same prompt, with its own cache rows and positions counted for itself.

    Attributes
    ----------
    name
        Unique within the method.
    image
        ``"same"``: the main branch's visual tokens; ``"pixels"``: as many tokens, features of the pixels that
        `DecodingMethod.transform_pixels` returns; ``"features"``: as many tokens, those that
        `DecodingMethod.transform_features` makes of the main branch's; ``"replaced"``: what
        `DecodingMethod.replace_image` puts in the image's place, read at plain text positions; ``"none"``: visual
        tokens, and the tokens that open and close an image, are left out of the prompt.
    text
        ``"same"``, or ``"edited"``: the prompt that `DecodingMethod.edit_tokens` returns.
    after_main
        What the branch shows depends on what the main branch attended to (`DecodingMethod.reads_prompt`), so it reads
        the prompt after it; decode steps are one forward of all branches none the less.
    """

    name: str
    image: str = "same"
    text: str = "same"
    after_main: bool = False

    def __post_init__(self) -> None:
        if self.image not in IMAGES or self.text not in TEXTS:
            raise ValueError(
                f"branch {self.name!r}: image={self.image!r} must be one of {', '.join(IMAGES)}, "
                f"text={self.text!r} one of {', '.join(TEXTS)}"
            )
        if self.image == "replaced" and self.text == "edited":
            raise ValueError(f"branch {self.name!r}: text around an image that is replaced cannot be edited as well")
        if self.after_main and not (self.same_tokens and self.needs_image):
            raise ValueError(f"branch {self.name!r}: after_main is for branches that show other pixels or features")

    @property
    def same_tokens(self) -> bool:
        """Whether its prompts are token by token those of the main branch."""
        return self.image not in ("none", "replaced") and self.text == "same"

    @property
    def needs_image(self) -> bool:
        """Whether it says nothing about a prompt without image."""
        return self.image in ("pixels", "features", "replaced")


@dataclass(frozen=True)
class DecodingMethod(Method):
    """
    Contrasts or combines branches; the engine stacks them in one forward per step, each with its own cache rows.

    A method without branches (`branches` returns none) is the plausibility cut alone. Methods that draw random numbers
    declare a field ``seed``.
    """

    kind: ClassVar[str] = "decoding"
    lazy_allowed: ClassVar[bool] = True
    """
    Whether branches may be skipped on steps where the cut leaves one token in every row: the output must then be fixed
    whatever the other branches say. False for methods without the cut and for gates that look at every step.
    """

    beta: float = setting(
        0.1, help="Plausibility cut in [0, 1]: tokens below beta times the largest probability are dropped; 0: no cut."
    )
    lazy: bool = setting(
        False,
        help="Run the branches only on steps where the cut leaves more than one token; same output, fewer forwards.",
    )

    def __post_init__(self) -> None:
        self._require(0.0 <= self.beta <= 1.0, "beta", "in [0, 1]")
        allowed = "False: this method needs its branches on every step"
        if self.lazy_allowed:
            allowed = f"False without a plausibility cut (beta={self.beta}), for no step is decided by the cut then"
        self._require(not self.lazy or (self.lazy_allowed and self.beta > 0), "lazy", allowed)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether these settings read or write text: without a processor ``wrap`` refuses the method then."""
        return False

    def main_branch(self, family: Any) -> Branch:
        """
        How the main rows read the prompt: as given, unless a method edits their text.

        ``Branch(..., text="edited")``: `edit_tokens` makes the prompt of the main rows too, and the edited prompt is
        what ``generate`` continues. Such a method cannot be lazy.
        """
        return Branch("main")

    def branches(self, family: Any) -> list[Branch]:
        """Branches beside the main one; the order is that of ``others`` in `weights` and `combine`."""
        return []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float | Tensor]:
        """
        Weights of the formula, main branch first; called only when there are branches.

        Parameters
        ----------
        main, others
            Raw float32 logits ``[B, vocabulary]``.
        step
            0 for the first generated token.
        view
            As in `combine`.

        Returns
        -------
        sequence
            Numbers, or tensors ``[B, 1]`` for weights that differ per row.
        """
        raise NotImplementedError

    def reads(self, family: Any) -> Sequence[int]:
        """Inputs of decoder layers at the newest token that `combine` looks at; ``num_layers``: the normed output."""
        return ()

    def reads_attention(self, family: Any) -> Sequence[int]:
        """Decoder layers whose attention of the newest token `combine` looks at."""
        return ()

    def reads_image(self, family: Any) -> Sequence[int]:
        """As `reads`, at the visual tokens of the prompt, kept for all steps."""
        return ()

    def reads_prompt(self, family: Any) -> Sequence[int]:
        """Decoder layers whose attention of the last prompt token `ImageView.attention` holds; for ``after_main``."""
        return ()

    def probes(self, family: Any) -> Sequence[Probe]:
        """Signals of the vision tower that `ImageView.readings` holds."""
        return ()

    def asks_first(self, family: Any) -> tuple[Branch, int] | None:
        """A reading that the model answers greedily before any other, with so many tokens at most; kept by image."""
        return None

    def branch_layers(self, family: Any) -> Sequence[int]:
        """Decoder layers in which `hide_keys` and `attend` are asked about the rows of branches."""
        return ()

    def hide_keys(self, call: BranchAttention, branch: Branch) -> Tensor | None:
        """
        Keys that the rows of a branch do not see in one of `branch_layers`; other methods' edits see them hidden too.

        Parameters
        ----------
        call
            Queries, keys and values of these rows alone, and what is known about them.
        branch
            Which branch.

        Returns
        -------
        Tensor or None
            Bool ``[B, Nq or 1, N]``, at least one key of every row left; None hides nothing.
        """
        return None

    def attend(self, call: BranchAttention, branch: Branch) -> Tensor | None:
        """
        Attention of the rows of a branch in one of `branch_layers`, in the place of the model's own and of any edits.

        Parameters
        ----------
        call, branch
            As in `hide_keys`.

        Returns
        -------
        Tensor or None
            ``[B, H, Nq, d]``; None for what the model and other methods make of it.
        """
        return None

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        """
        The batch goes on with these of its rows (beam search): reorder what ``view.memory`` holds per row.

        Parameters
        ----------
        rows
            ``[B]`` long.
        memory
            That of the prompt.
        """

    def keep(self, main: Tensor) -> Tensor | None:
        """Tokens that may be chosen, bool ``[B, vocabulary]``, from the raw main logits; None for all."""
        return plausible(main, self.beta)

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        """
        Logits that ``generate`` sees; override it only for a method that is no weighted sum.

        Parameters
        ----------
        main, others, step
            As in `weights`; ``others`` is empty for methods without branches.
        view
            What `reads`, `reads_attention` and `reads_image` asked for, and the method's memory of this prompt.

        Returns
        -------
        Tensor
            float32 ``[B, vocabulary]``, at least one finite entry per row.
        """
        weights = self.weights(main, others, step, view) if others else [1.0]
        return contrast([main, *others], weights, cut(self.keep(main), view))

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        """
        Pixels of one image for a branch with ``image="pixels"``.

        Parameters
        ----------
        pixels
            ``[crops or frames, C, H, W]`` float32, normalised, on the device of the inputs, whatever layout the model
            packs them in; a still image comes once where the model repeats it in time. Not to be changed in place.
        branch
            Which branch.
        generator
            On the CPU, seeded by the method's ``seed`` and the pixels: an image gets the same numbers in any batch.
        context
            Knows by what pixels are normalised, and keeps notes; in a branch that reads after the main one also what
            was asked of the image, and what was attended to.

        Returns
        -------
        Tensor
            Of the same shape.
        """
        raise NotImplementedError

    def transform_features(self, features: tuple[Tensor, ...], branch: Branch, image: ImageView) -> tuple[Tensor, ...]:
        """
        Visual tokens of one image for a branch with ``image="features"``.

        Parameters
        ----------
        features
            Each ``[n, D]`` in sequence order: what enters the decoder at the visual tokens, then one tensor per
            deepstack layer. Not to be changed in place.
        branch
            Which branch.
        image
            What else is known about the image.

        Returns
        -------
        tuple of Tensor
            As many, of the same shapes.
        """
        raise NotImplementedError

    def replace_image(
        self, features: tuple[Tensor, ...], branch: Branch, image: ImageView
    ) -> tuple[Tensor, ...] | Tensor:
        """
        What stands in the place of one image in a branch with ``image="replaced"``.

        Parameters
        ----------
        features, branch, image
            As in `transform_features`.

        Returns
        -------
        tuple of Tensor, or Tensor
            Visual tokens, each ``[k, D]`` with ``k >= 1``, as many tensors as ``features``; or ids of text, long
            ``[k]`` with ``k >= 0``, which also take the place of the tokens that open and close an image.
        """
        raise NotImplementedError

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        """
        Prompt of one row for a branch with ``text="edited"``.

        Parameters
        ----------
        tokens
            Long ``[n]`` without padding; visual tokens are already gone in a branch with ``image="none"``.
        branch
            Which branch.
        context
            Knows family, tokenizer and row, and the memory of the prompt.

        Returns
        -------
        Tensor
            Long ``[m]``, ``m >= 1``; visual tokens must all still be there, in order, if the branch has an image.
        """
        raise NotImplementedError
