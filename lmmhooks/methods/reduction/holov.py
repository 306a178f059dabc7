"""
HoloV: give every part of the image a share of the tokens, by how attended and how varied it is.

The most attended tokens crowd on one object. Here the image is divided into chunks, chunks share the budget by their
mean score, and the most attended tokens of each chunk stay.

Paper: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS 2025,
arXiv 2510.02912. Code: github.com/obananas/HoloV (Apache-2.0). Differs from the released code in that what a chunk
cannot use goes to the most attended tokens left, where that fills up with zero vectors; and for Qwen in the span, in
the order of scores under window attention, and in raster order. The release rescales diversity to the mean attention
of its chunk, so that the mean score of a chunk hardly depends on it: chunks share by attention almost alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import ReductionMethod, Scope, TokenGroup
from lmmhooks.methods.reduction.greedy import cosine
from lmmhooks.methods.reduction.lattice import lattice_shape, rectangle
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["HoloV", "allocate", "choose_by_chunk", "chunk_scores", "flat_chunks", "grid_chunks"]

#: By which the released code multiplies attention before it adds diversity.
ATTENTION_SCALE = 1000.0


@dataclass(frozen=True)
class HoloV(ReductionMethod):
    """
    The most attended tokens of every chunk of an image before the decoder, chunks in order.

    All crops of an image are one run of tokens, as released; ``chunk="grid"`` treats every crop on its own. Published
    ``keep`` on LLaVA-1.5: 64, the only one in the code (settings of the other tables UNVERIFIED).
    """

    id: ClassVar[str] = "holov"
    paper: ClassVar[str] = "Don't Just Chase 'Highlighted Tokens' in MLLMs, NeurIPS 2025, arXiv 2510.02912"
    code: ClassVar[str] = "https://github.com/obananas/HoloV"

    chunks: int | None = setting(
        None,
        help="Number of chunks, >= 1. None: as released, 16 with a class token, else 1024 / 576 times tokens by tokens "
        "kept, rounded down.",
    )
    chunk: Literal["flat", "grid"] = setting(
        "flat",
        help="'flat': runs of consecutive tokens, as released; 'grid': rectangles of every crop, as the paper draws.",
    )
    diversity: float = setting(
        0.09, help="Weight of the variance of similarities in a token's score, >= 0 (released: 0.09)."
    )
    layer: int | None = setting(
        None,
        help="Vision layer whose attention is read, 0-based. None: the layer whose output the projector takes (22 in "
        "CLIP-L), or the nearest one that sees the whole crop where there is no class token (31 in Qwen2.5-VL).",
    )
    order: Literal["auto", "attention", "raster"] = setting(
        "auto",
        help="Order for the decoder: 'attention', falling, inside every chunk as released for LLaVA; 'raster'; 'auto': "
        "'raster' where positions are kept.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.chunks is None or self.chunks >= 1, "chunks", ">= 1 or None")
        self._require(self.chunk in ("flat", "grid"), "chunk", "'flat' or 'grid'")
        self._require(self.diversity >= 0, "diversity", ">= 0")
        self._require(self.order in ("auto", "attention", "raster"), "order", "'auto', 'attention' or 'raster'")

    @property
    def scope(self) -> Scope:
        return "crop" if self.chunk == "grid" else "image"

    def probes(self, family: Any) -> list[Probe]:
        return [saliency_probe(self, family, self.layer)]

    def select(self, tokens: TokenGroup) -> Tensor:
        (attention,) = tokens.probes.values()
        chunk = self._chunk_of(tokens)
        scores = chunk_scores(tokens.states, attention, chunk, self.diversity)
        index = choose_by_chunk(attention, chunk, allocate(scores, tokens.num_keep), tokens.num_keep)
        in_order = self.order == "attention" or (self.order == "auto" and self.repacks(tokens.family))
        return index if in_order else index.sort(dim=1).values

    def _chunk_of(self, tokens: TokenGroup) -> Tensor:
        size = len(tokens.row)
        number = self.chunks
        if number is None:
            number = 16 if tokens.family.has_cls else int(1024 / 576 * size / tokens.num_keep)
        number = max(1, min(number, size))
        if self.chunk == "flat":
            return flat_chunks(size, number)
        grid = rectangle(tokens.row, tokens.col)
        if grid is None:
            raise PromptError(
                f"{self.id}: chunk='grid' needs crops whose tokens are a rectangle of known cells; use chunk='flat'"
            )
        return grid_chunks(*grid, number)


def flat_chunks(num_tokens: int, number: int) -> Tensor:
    """Chunk of every token, long ``[V]`` on the CPU: consecutive runs, the first ``V % number`` one longer."""
    size, rest = divmod(num_tokens, number)
    sizes = torch.tensor([size + (i < rest) for i in range(number)])
    return torch.arange(number).repeat_interleave(sizes)


def grid_chunks(rows: int, cols: int, number: int) -> Tensor:
    """The same as cells of a lattice of at least ``number`` rectangles over a grid in raster order."""
    down, across = lattice_shape(rows, cols, number)
    row, col = torch.arange(rows) * down // rows, torch.arange(cols) * across // cols
    return (row[:, None] * across + col).flatten()


@torch.no_grad()
def chunk_scores(states: Tensor, attention: Tensor, chunk: Tensor, diversity: float) -> Tensor:
    """
    Mean score of every chunk: attention, and how much similarities to the other tokens of the chunk vary.

    Parameters
    ----------
    states
        ``[G, V, D]``.
    attention
        ``[G, V]`` float32, >= 0.
    chunk
        ``[V]`` long, CPU; every chunk has a token.
    diversity
        Weight of the second part.

    Returns
    -------
    Tensor
        ``[G, C]`` float32.
    """
    sizes = chunk.bincount()
    by_chunk = chunk.argsort(stable=True).split(sizes.tolist())
    scores = attention.new_empty(len(attention), len(sizes))
    # Chunks are of few sizes; those of one size are scored together.
    for size in sizes.unique().tolist():
        alike = (sizes == size).nonzero()[:, 0]
        members = torch.stack([by_chunk[i] for i in alike.tolist()]).to(states.device)
        attended = attention[:, members]
        if size > 1:
            similarity = cosine(states[:, members].flatten(0, 1))
            similarity.diagonal(dim1=1, dim2=2).zero_()
            mean = similarity.sum(dim=2, keepdim=True) / (size - 1)
            # The zero of the diagonal counts among the deviations, as released.
            variance = (similarity - mean).square().sum(dim=2).view(attended.shape) / (size - 1)
            attended = attended * ATTENTION_SCALE
            scale = attended.abs().mean(dim=2, keepdim=True) / (variance.abs().mean(dim=2, keepdim=True) + 1e-6)
            attended = attended + diversity * variance * scale
        scores[:, alike.to(scores.device)] = attended.mean(dim=2)
    return scores


def allocate(scores: Tensor, num_keep: int) -> Tensor:
    """Tokens for every chunk, long ``[G, C]``: in proportion to its score, rounded down, one more for the largest."""
    weight = scores / (scores.sum(dim=1, keepdim=True) + 1e-6)
    share = (weight * num_keep).floor().long()
    left = num_keep - share.sum(dim=1, keepdim=True)
    rank = weight.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return share + (rank < left)


def choose_by_chunk(attention: Tensor, chunk: Tensor, share: Tensor, num_keep: int) -> Tensor:
    """
    The most attended tokens of every chunk, long ``[G, K]``: chunks in order, attention falling inside each.

    What a chunk is too small for goes to the most attended tokens that are left, wherever they are.
    """
    chunk = chunk.to(attention.device)
    falling = attention.argsort(dim=1, descending=True, stable=True)
    # Tokens chunk by chunk, attention falling inside; a token's rank in its chunk is its distance to the chunk's first.
    by_chunk = falling.gather(1, chunk[falling].argsort(dim=1, stable=True))
    sizes = torch.zeros_like(share[0]).index_add_(0, chunk, torch.ones_like(chunk))
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(len(chunk), device=chunk.device) - first[chunk[by_chunk]]
    taken = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, by_chunk, rank < share.gather(1, chunk[by_chunk]))
    # Those taken first, then by attention: the first K, put back in order of chunks.
    preferred = falling.gather(1, (~taken).gather(1, falling).byte().argsort(dim=1, stable=True))[:, :num_keep]
    kept = torch.zeros_like(taken).scatter_(1, preferred, True)
    return by_chunk.gather(1, (~kept).gather(1, by_chunk).byte().argsort(dim=1, stable=True)[:, :num_keep])
