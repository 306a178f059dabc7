"""
Contract of decoding methods: branches beside the model's own, and how their logits are combined.

One formula serves all of them (per row and step): ``S = sum_i w_i L_i``; tokens whose raw main logit lies below
``max L_0 + log(beta)`` become -inf; then the ordinary processors and warpers of ``generate``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import Method, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Branch", "DecodingMethod"]


@dataclass(frozen=True)
class Branch:
    """
    A second reading of the same prompt.

    Attributes
    ----------
    name
        Unique within the method.
    image
        ``"same"``: the main branch's visual tokens; ``"pixels"``: features of transformed pixels (the method's
        `DecodingMethod.transform_pixels` makes them); ``"none"``: visual tokens are left out of the prompt.
    """

    name: str
    image: str = "same"


@dataclass(frozen=True)
class DecodingMethod(Method):
    """
    Contrasts or combines branches; the engine stacks them in one forward per step, each with its own cache rows.
    """

    kind: ClassVar[str] = "decoding"
    lazy_allowed: ClassVar[bool] = True
    """Whether branches may be skipped on steps where the plausibility mask leaves one token."""

    beta: float = setting(
        0.1, help="Plausibility cut in [0, 1]: tokens below beta times the largest probability are dropped; 0: no cut."
    )
    lazy: bool = setting(
        False,
        help="Run the branches only on steps where the cut leaves more than one token; same output, fewer forwards.",
    )

    def __post_init__(self) -> None:
        self._require(0.0 <= self.beta <= 1.0, "beta", "in [0, 1]")

    def branches(self, family: Any) -> list[Branch]:
        """Branches beside the main one."""
        return []

    def weights(self, main: Tensor, others: list[Tensor], step: int) -> list[float | Tensor]:
        """
        Weights of the formula, main branch first.

        Parameters
        ----------
        main, others
            Raw float32 logits ``[B, vocabulary]``.
        step
            0 for the first generated token.

        Returns
        -------
        list
            Numbers, or tensors ``[B, 1]`` for weights that differ per row.
        """
        raise NotImplementedError

    def transform_pixels(self, pixels: Tensor, branch: Branch, generator: torch.Generator) -> Tensor:
        """
        Pixels of a branch.

        Parameters
        ----------
        pixels
            ``[images or crops, C, H, W]`` normalised pixels in float32, whatever layout the model uses.
        generator
            Seeded per sample on the CPU.
        """
        raise NotImplementedError
