"""
Attention flow of VL-SAM: rollout with weighted heads and a correction for the causal mask.

"Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts" (NeurIPS 2024, 2410.05963); no
code is published. Heads weigh by ``mean_i max_j S``; ``F <- (I + S)(I + F)`` layer by layer; column j of N positions,
which N - j rows can see, is multiplied by ``1 - (N - j - 1) / N``, against the collapse to the first columns. The row
is that of the answer's token itself, read after the answer.

UNVERIFIED, because only restatements of the paper were at hand: the start F = S, whether columns are corrected after
every layer (default) or once at the end, and that L in the correction means the length of a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question
from lmmhooks.inspect.maps.rollout import read_matrices
from lmmhooks.methods.refinement.flow import REGULARISE, column_factors, flow_rows, head_weights, weighted_mean

__all__ = ["Flow", "column_factors", "flow_rows", "head_weights", "weighted_mean"]


@dataclass(frozen=True)
class Flow(MapKind):
    """
    Attention flow from a token of the answer to the image; reads prompt and answer twice.

    Attributes
    ----------
    regularise
        Where columns are corrected; see `flow_rows`.
    """

    regularise: str = "layer"

    id: ClassVar[str] = "flow"
    paper: ClassVar[str] = "VL-SAM, NeurIPS 2024 (2410.05963)"

    def __post_init__(self) -> None:
        self._require(self.regularise in REGULARISE, "regularise", f"one of {', '.join(REGULARISE)}")

    def values(self, question: Question) -> Tensor:
        heads, num_tokens = list(question.heads), len(question.answered.new_ids)
        question.passes.check_length(question.prompt_length + num_tokens, self.id)
        peaks: dict[int, list[Tensor]] = {}

        def weigh(layer: int, weights: Tensor) -> None:
            peaks.setdefault(layer, []).append(weights[heads].amax(dim=-1))

        # All rows decide on the weights of heads, so that they are known only after a first reading.
        read_matrices(question, self.id, weigh, num_tokens)
        known = {layer: torch.cat(blocks, dim=1).mean(dim=1) for layer, blocks in peaks.items()}
        matrices = read_matrices(
            question, self.id, lambda layer, weights: weighted_mean(weights[heads], known[layer]), num_tokens
        )
        rows = flow_rows(matrices, [question.prompt_length + t for t in question.rows], self.regularise)
        return question.without_gone(rows[:, question.positions])
