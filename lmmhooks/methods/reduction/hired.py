"""
HiRED: spend a fixed budget over the tiles of a high-resolution image in proportion to their content.

The class token of the thumbnail shows in the first vision layer where there is content, in a late layer what matters.
The first decides how much of the budget each tile gets, the second which of its tokens.

Paper: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models", AAAI
2025, arXiv 2408.10945. Code: github.com/hasanar1f/HiRED (MIT). Two limits: budgets are counted over tokens that the
prompt has, while the released code also gives tokens to padding and loses them; and tiles are in the row-major order of
current libraries, which the released code transposes where the grid is not square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import ReductionMethod, TokenGroup
from lmmhooks.methods.reduction.selection import ascending_indices, ranks
from lmmhooks.methods.vision_scores import saliency_probe
from lmmhooks.vision import Tiling

__all__ = ["HiRED", "block_regions", "strip_regions", "tile_budgets"]


@dataclass(frozen=True)
class HiRED(ReductionMethod):
    """
    Top tokens of the thumbnail and of every tile by late class-token attention, in the order of the prompt.

    Published: ``keep=0.2`` on LLaVA-NeXT. Images of a single crop (LLaVA-1.5, Qwen) keep their top tokens, as
    `fastervlm`; frames of a video share evenly. Towers without a class token are scored by the attention a patch
    receives in an early and a late layer that see the whole crop: UNVERIFIED.
    """

    id: ClassVar[str] = "hired"
    paper: ClassVar[str] = "HiRED: Attention-Guided Token Dropping, AAAI 2025, arXiv 2408.10945"
    code: ClassVar[str] = "https://github.com/hasanar1f/HiRED"

    alpha: float = setting(
        0.5,
        help="Share of the budget for the thumbnail, in [0, 1]; the top 1 - alpha of the thumbnail's tokens count as "
        "content when the rest is shared out (0.5 in all released scripts).",
    )
    region: Literal["strip", "block"] = setting(
        "strip",
        help="Part of the thumbnail that stands for a tile: 'strip' of its rows, as the released code has it, or the "
        "'block' that shows what the tile shows, as its description means.",
    )
    exact_budget: bool = setting(
        False,
        help="True: what rounding down and full tiles leave over goes to the tiles with the largest fractions. False: "
        "it is lost, as released.",
    )
    budget_layer: int | None = setting(
        None, help="Vision layer whose attention measures content, 0-based. None: the first that sees the whole crop."
    )
    layer: int | None = setting(
        None,
        help="Vision layer whose attention ranks tokens, 0-based. None: the layer whose output the projector takes (22 "
        "in CLIP-L, as published).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.alpha <= 1, "alpha", "in [0, 1]")
        self._require(self.region in ("strip", "block"), "region", "'strip' or 'block'")

    def probes(self, family: Any) -> list[Probe]:
        early = saliency_probe(self, family, self.budget_layer, preferred=0, name="budget_layer")
        return [early, saliency_probe(self, family, self.layer)]

    def count(self, share: float, num_tokens: int) -> int:
        return max(1, int(num_tokens * share))

    def select(self, tokens: TokenGroup) -> Tensor:
        early, late = (tokens.probes[probe.name] for probe in self.probes(tokens.family))
        if tokens.tiling is not None:
            order = [tokens.tiling.overview, *tokens.tiling.tiles]
        else:
            order = tokens.crop.unique().tolist()
        parts = [(tokens.crop == crop).nonzero().flatten().to(late.device, non_blocking=True) for crop in order]
        budgets = self._budgets(tokens, early, parts)
        kept = torch.zeros_like(late, dtype=torch.bool)
        for part, budget in zip(parts, budgets.unbind(dim=1), strict=True):
            kept[:, part] = ranks(late[:, part]) < budget[:, None]
        return ascending_indices(kept, tokens.num_keep)

    def _budgets(self, tokens: TokenGroup, early: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """``[G, parts]``: tokens kept of every part."""
        sizes, total = [len(part) for part in parts], tokens.num_keep
        if tokens.tiling is None:
            return torch.tensor(self.split(total, sizes), device=early.device).expand(len(early), -1)
        overview = parts[0]
        full = min(int(total * self.alpha), sizes[0])
        rest = min(total - full, sum(sizes[1:]))
        if self.exact_budget:
            full = total - rest
        if self.region == "strip":
            regions = strip_regions(sizes[0], tokens.tiling.num_tiles)
        else:
            regions = self._blocks(tokens, tokens.tiling)
        num_content = int(sizes[0] * (1 - self.alpha))
        shares = tile_budgets(early[:, overview], regions, sizes[1:], num_content, rest, exact=self.exact_budget)
        return torch.cat([shares.new_full((len(early), 1), full), shares], dim=1)

    def _blocks(self, tokens: TokenGroup, tiling: Tiling) -> Tensor:
        of_overview = tokens.crop == tiling.overview
        row, col = tokens.row[of_overview], tokens.col[of_overview]
        if tiling.grid is None:
            raise MethodError(
                f"{self.id}: region='block' needs the rows and columns of an image's tiles, which "
                f"{tokens.family.name} does not tell; use region='strip'"
            )
        return block_regions(row, col, tiling.grid)


def strip_regions(num_tokens: int, num_tiles: int) -> Tensor:
    """Tile that a token of the thumbnail counts for, ``[N]`` long: equal runs of its flat order, edges rounded down."""
    return ((torch.arange(num_tokens) + 1) * num_tiles - 1) // num_tokens


def block_regions(row: Tensor, col: Tensor, tiles: tuple[int, int]) -> Tensor:
    """The same for blocks: ``row`` and ``col`` are cells ``[N]`` of the thumbnail, ``tiles`` rows and columns."""
    rows, cols = int(row.max()) + 1, int(col.max()) + 1
    return ((row + 1) * tiles[0] - 1) // rows * tiles[1] + ((col + 1) * tiles[1] - 1) // cols


def tile_budgets(
    scores: Tensor, regions: Tensor, sizes: Sequence[int], num_content: int, budget: int, *, exact: bool
) -> Tensor:
    """
    Share a budget out over tiles by the thumbnail tokens that count as content.

    Parameters
    ----------
    scores
        ``[G, N]`` of the thumbnail.
    regions
        ``[N]`` long, CPU: the tile a thumbnail token counts for.
    sizes
        Tokens of every tile, the most it can be given.
    num_content
        How many top tokens are content.
    budget
        Tokens to share out, at most ``sum(sizes)``.
    exact
        Give away what rounding down and full tiles leave over: one to each tile in the order of the fractions, then
        whatever fits in that order.

    Returns
    -------
    Tensor
        ``[G, tiles]`` long.
    """
    content = (ranks(scores) < num_content).float()
    weights = content.new_zeros(len(scores), len(sizes)).index_add(1, regions.to(scores.device), content)
    # Single precision and this order of operations decide, as in the released code, where a share rounds down.
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=1) * budget
    room = torch.tensor(sizes, device=scores.device)
    budgets = shares.long().minimum(room)
    if exact:
        order = (shares - shares.floor()).argsort(dim=1, descending=True, stable=True)
        for most in (1, max(sizes)):
            left = budget - budgets.sum(dim=1, keepdim=True)
            takes = (room - budgets).clamp(max=most).gather(1, order)
            given = (left - takes.cumsum(dim=1) + takes).clamp(min=0).minimum(takes)
            budgets = budgets.scatter_add(1, order, given)
    return budgets
