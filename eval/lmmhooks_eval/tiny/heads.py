"""Auxiliary heads of the vision stage. They are dropped after training.

Dense heads say for every patch which category and colour it shows and where it lies; the CLS heads say which categories
the image holds. They teach the vision tower what language alone would teach far more slowly, and the CLS heads make the
attention of CLS informative, which attention-based token selection relies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmmhooks_eval.tiny.adapters import VisualStates
from lmmhooks_eval.tiny.models import GRID_SIDE
from lmmhooks_eval.tiny.packing import IGNORE
from lmmhooks_eval.tiny.scenes import IMAGE_SIZE, Scene
from lmmhooks_eval.tiny.shapes import mask
from lmmhooks_eval.tiny.vocabulary import CATEGORIES, CATEGORY_INDEX, COLOUR_INDEX, COLOURS

BACKGROUND = len(CATEGORIES)
"""Dense category label of patches without an object."""
MIN_COVERAGE = 0.08
"""Share of a patch that an object must cover to be its label."""
PATCH = IMAGE_SIZE // GRID_SIDE


@dataclass(frozen=True)
class SceneTargets:
    """Targets of a batch: ``categories`` and ``colours`` int64 ``(B, 64)``, ``presence`` float ``(B, categories)``."""

    categories: Tensor
    colours: Tensor
    presence: Tensor


def scene_targets(scenes: Sequence[Scene]) -> SceneTargets:
    """Dense and image-level targets; colours are `IGNORE` on background."""
    categories = np.full((len(scenes), GRID_SIDE**2), BACKGROUND, np.int64)
    colours = np.full((len(scenes), GRID_SIDE**2), IGNORE, np.int64)
    presence = np.zeros((len(scenes), len(CATEGORIES)), np.float32)
    for row, scene in enumerate(scenes):
        best = np.full((GRID_SIDE, GRID_SIDE), MIN_COVERAGE * PATCH * PATCH, np.float32)
        for item in scene.objects:
            presence[row, CATEGORY_INDEX[item.category]] = 1.0
            canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
            canvas[item.top : item.top + item.extent, item.left : item.left + item.extent] = mask(
                item.category, item.extent
            )
            covered = canvas.reshape(GRID_SIDE, PATCH, GRID_SIDE, PATCH).sum(axis=(1, 3))
            wins = covered > best
            best[wins] = covered[wins]
            categories[row, wins.ravel()] = CATEGORY_INDEX[item.category]
            colours[row, wins.ravel()] = COLOUR_INDEX[item.colour]
    return SceneTargets(torch.from_numpy(categories), torch.from_numpy(colours), torch.from_numpy(presence))


class VisionHeads(nn.Module):
    """Linear probes on patches and CLS states.

    Parameters
    ----------
    patch_width
        Width of the patch states.
    num_summaries
        Number of CLS states, each with its own multi-label head.
    """

    def __init__(self, patch_width: int, num_summaries: int) -> None:
        super().__init__()
        self.category = nn.Linear(patch_width, len(CATEGORIES) + 1)
        self.colour = nn.Linear(patch_width, len(COLOURS))
        self.row = nn.Linear(patch_width, GRID_SIDE)
        self.column = nn.Linear(patch_width, GRID_SIDE)
        self.presence = nn.ModuleList(nn.Linear(patch_width, len(CATEGORIES)) for _ in range(num_summaries))

    def forward(self, visual: VisualStates, targets: SceneTargets) -> tuple[Tensor, dict[str, float]]:
        """Summed loss and monitored accuracies.

        Returns
        -------
        tuple
            Scalar loss; dict with ``category`` and ``colour`` (accuracy on object patches), ``position`` (row and
            column both right) and, for models with CLS, ``presence`` (F1 of the penultimate CLS head), all in [0, 1].
        """
        patches = visual.patches
        category, colour = self.category(patches).flatten(0, 1).float(), self.colour(patches).flatten(0, 1).float()
        wanted, wanted_colour = targets.categories.flatten(), targets.colours.flatten()
        is_object = wanted != BACKGROUND
        per_patch = functional.cross_entropy(category, wanted, reduction="none")
        # Objects cover a fifth of the patches: both kinds weigh the same, or "background" would win on faint objects.
        loss = per_patch[is_object].mean() + 0.5 * per_patch[~is_object].mean()
        loss = loss + 0.5 * functional.cross_entropy(colour, wanted_colour, ignore_index=IGNORE)
        grid = torch.arange(GRID_SIDE, device=patches.device)
        rows = grid.repeat_interleave(GRID_SIDE).repeat(patches.shape[0])
        columns = grid.repeat(GRID_SIDE * patches.shape[0])
        row, column = self.row(patches).flatten(0, 1).float(), self.column(patches).flatten(0, 1).float()
        loss = loss + 0.15 * (functional.cross_entropy(row, rows) + functional.cross_entropy(column, columns))
        position_right = (row.argmax(-1) == rows) & (column.argmax(-1) == columns)
        measured = {
            "category": _share(category.argmax(-1) == wanted, is_object),
            "colour": _share(colour.argmax(-1) == wanted_colour, is_object),
            "position": _share(position_right, torch.ones_like(position_right)),
        }
        for index, (head, summary) in enumerate(zip(self.presence, visual.summaries, strict=True)):
            logits = head(summary).float()
            loss = loss + 2.0 * functional.binary_cross_entropy_with_logits(logits, targets.presence)
            if index == 0:
                found, real = logits > 0, targets.presence > 0.5
                hits = (found & real).sum().item()
                measured["presence"] = 2 * hits / max(1, int(found.sum().item() + real.sum().item()))
        return loss, measured


def _share(right: Tensor, among: Tensor) -> float:
    return float((right & among).sum().item()) / max(1, int(among.sum().item()))
