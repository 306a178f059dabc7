"""
Gradient-weighted attention: attention times how much more of it would raise the answer's log-probability.

"MLLMs Know Where to Look" (grad-att, ICLR 2025, 2502.17422), code saccharomycetes/mllms_know: ``mean_h A relu(dv/dA)``
at one layer, v the log-probability of the token that is chosen. The row that chooses a token reaches the output through
the newest position alone, so its derivative is that of one token's forward, exact and without the graph of the prompt.

For the first token the last position of the prompt is read again as a token that continues the prompt: edits that
methods make in prompts only are not in that row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question
from lmmhooks.inspect.maps.derivatives import through_rows
from lmmhooks.inspect.maps.replay import Replay
from lmmhooks.methods.refinement.vicrop import PUBLISHED, SHARE_OF_DEPTH

if TYPE_CHECKING:
    from lmmhooks.family import Family

__all__ = ["Gradient", "gradient_weighted"]


def gradient_weighted(weights: Tensor, gradient: Tensor) -> Tensor:
    """
    Mean over heads of attention times the positive part of its gradient.

    Parameters
    ----------
    weights, gradient
        ``[H, ...]``.

    Returns
    -------
    Tensor
        ``[...]``.
    """
    return (weights * gradient.clamp(min=0)).mean(dim=0)


@dataclass(frozen=True)
class Gradient(MapKind):
    """Attention weighted by its gradient; with several layers the mean over them."""

    id: ClassVar[str] = "grad"
    paper: ClassVar[str] = "ViCrop, ICLR 2025 (2502.17422)"

    def default_layers(self, family: Family) -> Sequence[int]:
        """The one layer of the released code; for models it does not know the same share of the depth."""
        shape = (family.name, family.hidden_size, family.num_layers)
        return (PUBLISHED.get(shape, round(family.num_layers * SHARE_OF_DEPTH)),)

    def values(self, question: Question) -> Tensor:
        new, heads = question.answered.new_ids, list(question.heads)
        found: list[Tensor] = []
        with through_rows(question.passes, question.layers, whole=False) as reading:
            with torch.no_grad():
                reading.replay.read()
            for t in range(max(question.rows) + 1):
                if t not in question.rows:
                    with torch.no_grad():
                        self._advance(reading.replay, new, t)
                    continue
                with reading.recording():
                    logits = self._advance(reading.replay, new, t)
                    chance = logits[0].float().log_softmax(dim=-1)[new[t]]
                    layers = [
                        _on_image(
                            question, gradient_weighted(block.weights[heads, -1], gradient[heads, -1]), block.columns
                        )
                        for [(block, gradient)] in reading.by_weights(chance).values()
                    ]
                stacked = torch.stack(layers)
                gone = stacked.isnan().all(dim=0)
                found.append((stacked.nan_to_num(0.0).mean(dim=0)).masked_fill(gone, torch.nan))
        return torch.stack(found)

    @staticmethod
    def _advance(replay: Replay, new: Sequence[int], t: int) -> Tensor:
        return replay.step(new[t - 1]) if t else replay.read_last_again()


def _on_image(question: Question, row: Tensor, columns: Tensor) -> Tensor:
    """Of a row over keys, what stands at the visual tokens of the image; NaN for those that are gone."""
    place = torch.full((int(max(columns.max(), question.positions.max())) + 1,), -1)
    known = (columns >= 0).nonzero().flatten()
    place[columns[known]] = known
    at = place[question.positions]
    return row.detach().cpu()[at.clamp(min=0)].masked_fill(at < 0, torch.nan)
