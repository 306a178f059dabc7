"""
Contract of methods that judge the candidates of beam search by what each of them attends to.

At every step the engine reads the most likely next tokens of every beam, all in one forward, and shows the method what
each pays attention to in the last decoder layer. The method lowers their logits, and may send the search of a sample
back to an earlier step. Everything is per sample: rows of a batch take different ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmmhooks.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Judgement", "SearchMethod"]


@dataclass(frozen=True, eq=False)
class Judgement:
    """
    What a method says of the K candidates of each of the b beams of one sample.

    Attributes
    ----------
    penalty
        ``[b, K]`` float32, subtracted from the candidates' logits.
    trails
        ``[b, K, n]``: what the method has to remember of a beam that goes on with this candidate.
    location
        ``[b]`` long: what the method notes about each beam for `SearchMethod.retrospect`.
    """

    penalty: Tensor
    trails: Tensor
    location: Tensor


@dataclass(frozen=True)
class SearchMethod(Method):
    """Judges candidates of beam search; a method subclasses it and sets ``id``."""

    kind: ClassVar[str] = "decoding"

    @property
    def candidates_per_beam(self) -> int:
        """How many next tokens of every beam are looked at; the others can only be chosen for want of these."""
        raise NotImplementedError

    def judge(self, attention: Tensor, image: Tensor, trail: Tensor) -> Judgement:
        """
        Judge the candidates of one sample.

        Parameters
        ----------
        attention
            ``[b, K, n]`` float32: the largest weight any head of the last layer gives to each token of the answer, the
            candidate itself last; rows are normalised to sum 1 over the whole sequence, prompt included.
        image
            ``[b, K]`` float32: the same mass on all visual tokens.
        trail
            ``[b, n - 1]``: that of each beam so far; empty at the first token.
        """
        raise NotImplementedError

    def retrospect(self, locations: Tensor, attempts: Mapping[int, int]) -> int | None:
        """
        Whether the search of one sample goes back.

        Parameters
        ----------
        locations
            ``[b, n]`` long: `Judgement.location` of every step so far, the current one last. Steps that were taken back
            are not among them; columns are not reordered when beams are.
        attempts
            How often the search has gone back to a step already.

        Returns
        -------
        int or None
            The answer token (0-based) to choose anew, below n; None to go on.
        """
        return None
