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

    from lmmhooks.methods.decoding.view import StepView

__all__ = ["Branch", "DecodingMethod", "contrast", "plausible"]

IMAGES = ("same", "pixels", "none")
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
        `DecodingMethod.transform_pixels` returns; ``"none"``: visual tokens, and the tokens that open and close an
        image, are left out of the prompt.
    text
        ``"same"``, or ``"edited"``: the prompt that `DecodingMethod.edit_tokens` returns.
    """

    name: str
    image: str = "same"
    text: str = "same"

    def __post_init__(self) -> None:
        if self.image not in IMAGES or self.text not in TEXTS:
            raise ValueError(
                f"branch {self.name!r}: image={self.image!r} must be one of {', '.join(IMAGES)}, "
                f"text={self.text!r} one of {', '.join(TEXTS)}"
            )

    @property
    def same_tokens(self) -> bool:
        """Whether its prompts are token by token those of the main branch."""
        return self.image != "none" and self.text == "same"


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
        return contrast([main, *others], weights, self.keep(main))

    def transform_pixels(self, pixels: Tensor, branch: Branch, generator: torch.Generator) -> Tensor:
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

        Returns
        -------
        Tensor
            Of the same shape.
        """
        raise NotImplementedError

    def edit_tokens(self, tokens: Tensor, branch: Branch, family: Any) -> Tensor:
        """
        Prompt of one row for a branch with ``text="edited"``.

        Parameters
        ----------
        tokens
            Long ``[n]`` without padding; visual tokens are already gone in a branch with ``image="none"``.
        branch
            Which branch.
        family
            The model family.

        Returns
        -------
        Tensor
            Long ``[m]``, ``m >= 1``; visual tokens must all still be there, in order, if the branch has an image.
        """
        raise NotImplementedError
