"""
DART: keep what repeats the pivots least, so that near-duplicates go.

A few pivots (visual and text tokens with the largest keys) each take the visual tokens least similar to them; how
important a token is plays no part.

Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025, arXiv
2502.11494. Code: github.com/ZichenWen1/DART (Apache-2.0). Its LLaVA file could not be read (UNVERIFIED): this follows
the sheet drawn from later code of the same authors and ports. That code visits pivots in the order of a Python set,
which is arbitrary; here by falling norm, visual ones first (``order`` for another).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe, RowsRead
from lmmhooks.methods.reduction.base import Cut, Newline, Positions, ReductionMethod, Scope, TokenGroup

__all__ = ["Dart", "key_norms", "least_similar"]


def key_norms(read: RowsRead) -> Tensor:
    """L1 norm ``[B, N]`` of the keys as attention uses them, all query heads' side by side; once per prompt."""
    heads = read.weights.shape[1] // read.key.shape[1]
    norms = heads * read.key.float().abs().sum(dim=(1, 3))
    # What blocks of rows return is summed, and norms do not depend on rows: one block speaks for all.
    is_first = not read.memory
    read.memory["read"] = True
    return norms if is_first else torch.zeros_like(norms)


def least_similar(pivots: Tensor, real: Tensor, states: Tensor, free: Tensor, shares: list[int]) -> Tensor:
    """
    What pivots choose, one after the other: the free tokens least similar to them.

    Parameters
    ----------
    pivots
        ``[G, P, D]`` in the order in which they choose.
    real
        ``[G, P]`` bool: False for pivots that there are not, which choose nothing.
    states
        ``[G, V, D]``.
    free
        ``[G, V]`` bool: candidates.
    shares
        P numbers of tokens, at most as many together as there are candidates.

    Returns
    -------
    Tensor
        ``[G, V]`` bool. The lower index wins a tie.
    """
    pivots, states = pivots.float(), states.float()
    lengths = pivots.norm(dim=-1)[:, :, None] * states.norm(dim=-1)[:, None]
    similarity = pivots @ states.transpose(1, 2) / lengths.clamp(min=1e-8)
    chosen = torch.zeros_like(free)
    for place, share in enumerate(shares):
        order = similarity[:, place].masked_fill(~free, torch.inf).sort(dim=1, stable=True).indices[:, :share]
        taken = torch.zeros_like(free).scatter(1, order, True) & real[:, place, None]
        chosen, free = chosen | taken, free & ~taken
    return chosen


@dataclass(frozen=True)
class Dart(ReductionMethod):
    """
    One cut before decoder layer ``layer`` by duplication.

    As released, ``keep`` is divided among the pivots, rounded down, and the visual pivots come on top: 132 tokens for
    128. Under a ``budget`` they are counted in, and what rounding leaves goes to the first pivots. Published
    rows of 192, 128 and 64 tokens use these as ``keep``; as averages they are 219.8, 159.8 and 99.8. All images of a
    prompt are one span; text pivots come from the text after the last image.
    """

    id: ClassVar[str] = "dart"
    paper: ClassVar[str] = "Stop Looking for Important Tokens, EMNLP 2025, arXiv 2502.11494"
    code: ClassVar[str] = "https://github.com/ZichenWen1/DART"
    cut_settings: ClassVar[tuple[str, ...]] = ("layer",)

    keep: int | float | None = setting(
        2 / 9,
        help="Visual tokens kept from the cut on, visual pivots not counted: a count per image (192, 128, 64), or a "
        "share in (0, 1]; paper: 1/3, 2/9, 1/9.",
    )
    positions: Positions = setting(
        "keep",
        help="'keep' leaves survivors their original positions, as released; 'repack' renumbers them; "
        "'auto' is 'keep'.",
    )
    newline: Newline = setting(
        "rank", help="Newline tokens: 'rank' them like visual ones; or 'drop', 'keep_per_row', 'per_kept_row'."
    )
    layer: int = setting(2, help="First decoder layer that sees the reduced set, >= 1 (paper: 2).")
    pivots: int = setting(4, help="Visual pivots, at least 1; they always stay (paper: 4).")
    text_pivots: int = setting(4, help="Text pivots, at least 0 (paper: 4).")
    order: tuple[int, ...] | None = setting(
        None,
        help="Order in which pivots choose, as a permutation of all of them, counted by falling norm, visual ones "
        "first. None: that order.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.keep is not None, "keep", "a token count or a share in (0, 1]")
        self._require(self.layer >= 1, "layer", ">= 1: the layer before it gives the keys")
        self._require(self.pivots >= 1, "pivots", ">= 1")
        self._require(self.text_pivots >= 0, "text_pivots", ">= 0")
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))
            total = self.pivots + self.text_pivots
            self._require(sorted(self.order) == list(range(total)), "order", f"a permutation of 0 to {total - 1}")

    @property
    def scope(self) -> Scope:
        return "sample"

    def repacks(self, family: Any) -> bool:
        return self.positions == "repack"

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(self.layer, self.keep)] if self.layer < family.num_layers else []

    def probes(self, family: Any) -> list[Probe]:
        if self.layer >= family.num_layers:
            return []
        return [Probe("decoder_rows", self.layer - 1, "last", reduce=key_norms, label="key norms")]

    def _shares(self, num_tokens: int, num_keep: int) -> tuple[int, list[int]]:
        """How many visual pivots there are, and how many tokens every pivot chooses."""
        total = self.pivots + self.text_pivots
        if self.budget is None:
            pivots = min(self.pivots, num_tokens)
            shares = [num_keep // total] * total
        else:
            pivots = min(self.pivots, num_keep)
            share, rest = divmod(num_keep - pivots, total)
            shares = [share + (place < rest) for place in range(total)]
        left = num_tokens - pivots
        for place, share in enumerate(shares):
            shares[place] = min(share, left)
            left -= shares[place]
        return pivots, shares

    def select(self, tokens: TokenGroup) -> Tensor:
        [(name, norms)] = tokens.probes.items()
        num_groups, num_tokens = norms.shape
        num_pivots, shares = self._shares(num_tokens, tokens.num_keep)
        visual = norms.sort(dim=1, descending=True, stable=True).indices[:, : self.pivots]
        text = tokens.layout.after_last_image[tokens.sample]
        ranked = tokens.readings[name][tokens.sample].masked_fill(~text, -torch.inf)
        beside = ranked.sort(dim=1, descending=True, stable=True).indices[:, : self.text_pivots]
        # The module's forward alone: calling it would set off hooks that belong to the end of the decoder.
        norm = tokens.family.norm.forward
        states = norm(tokens.states)
        own = states.gather(1, visual[..., None].expand(-1, -1, states.shape[-1]))
        pivots = torch.cat([own, norm(tokens.hidden[tokens.sample[:, None], beside])], dim=1)
        real = torch.cat([torch.ones_like(visual, dtype=torch.bool), text.gather(1, beside)], dim=1)
        if self.order is not None and pivots.shape[1] == len(self.order):
            order = torch.tensor(self.order, device=norms.device)
            pivots, real = pivots[:, order], real[:, order]
        free = torch.ones_like(norms, dtype=torch.bool).scatter(1, visual[:, :num_pivots], False)
        chosen = least_similar(pivots, real, states, free, shares[: pivots.shape[1]])
        kept = chosen | ~free
        index = torch.arange(num_tokens, device=norms.device).expand(num_groups, -1)
        # Missing text pivots leave gaps: those go to the end, as fillers.
        index = index.masked_fill(~kept, num_tokens).sort(dim=1).values[:, : num_pivots + sum(shares)]
        return index.masked_fill(index == num_tokens, -1)
