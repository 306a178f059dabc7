"""
YOPO: keep all visual tokens and do less for them.

Four cuts in the work for visual tokens, of which three need no training: visual rows see the cells around them only;
heads that do not look at the image lose it altogether; from some layer on nothing looks at the image any more. (The
fourth, half of the feed-forward neurons, needs fine-tuning and is left out.)

Differs from the released code, which computes everything and masks: pairs nobody looks at are not computed, and behind
the layer cut visual rows are frozen, since no text row sees what would become of them. Its neighbourhood replaces the
causal mask, so that a cell sees those behind it: ``causal=True`` has the other reading. Its branch for Qwen2-VL adds
logits to themselves and is not followed. Neighbours are cells of one crop; newline tokens see themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lmmhooks.cost import LayerCounts
from lmmhooks.errors import PromptError
from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.base import names_record, setting
from lmmhooks.methods.reduction.compute import ComputeContext, ComputeMethod, PromptTokens
from lmmhooks.methods.reduction.sparse import attend_blocks, neighbours, row_blocks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["YOPO", "hide_image", "looks_at_image"]

HeadList = tuple[tuple[int, tuple[int, ...]], ...]


def looks_at_image(weights: Tensor, visual: Tensor) -> Tensor:
    """
    How much more a row looks at the image than elsewhere, by which heads are told apart.

    Parameters
    ----------
    weights
        ``[B, H, N]`` attention of one generated row.
    visual
        ``[B, N]`` bool.

    Returns
    -------
    Tensor
        ``[B, H]`` float32: attention on visual keys over attention on all others.
    """
    image = (weights * visual[:, None]).sum(dim=-1)
    return image / (weights * ~visual[:, None]).sum(dim=-1)


def hide_image(weights: Tensor, visual: Tensor, heads: Tensor, renormalise: bool) -> Tensor:
    """
    Take attention off the image in some heads.

    Parameters
    ----------
    weights
        ``[B, H, R, N]`` after the softmax.
    visual
        ``[B, N]`` bool.
    heads
        ``[H]`` bool: those that lose the image.
    renormalise
        Rows sum to 1 again, as if the image had been masked before the softmax; otherwise what they lose is lost.
    """
    left = weights.masked_fill(visual[:, None, None] & heads[:, None, None], 0)
    # Every text row sees itself, so something is always left to divide by.
    return left / left.sum(dim=-1, keepdim=True) if renormalise else left


@dataclass(frozen=True)
class YOPO(ComputeMethod, AttentionMethod):
    """
    Neighbour-aware attention, inactive visual heads and a layer cut (see the module docstring).

    Published for training-free use: on Qwen2-VL-7B 14 of 28 heads and a layer cut at 24 of 28, no neighbourhoods
    (``preset='qwen2-vl'``, with ``heads=None`` for a measured head list); on InternVL2 a head list (UNVERIFIED: no
    tables). Window 5 with a layer cut at 20 of 40 (``preset='llava-13b'``) was published for fine-tuned checkpoints.
    """

    id: ClassVar[str] = "yopo"
    kind: ClassVar[str] = "reduction"
    paper: ClassVar[str] = (
        "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See, arXiv 2410.06169"
    )
    code: ClassVar[str] = "https://github.com/ZhangAIPI/YOPO_MLLM_Pruning"
    rows: ClassVar[str] = "after_image"
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {"heads": "command"}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "qwen2-vl": {"window": None, "layer_cut": 24, "renormalise_cut": True},
        "llava-13b": {"window": 5, "layer_cut": 20},
    }

    window: int | None = setting(
        5, help="Side of the square of cells that a visual row sees, odd and >= 1; None: all before it. Released: 5."
    )
    causal: bool = setting(False, help="Only cells before a row, not those behind it. Released: False.")
    heads: Any = setting(
        "all",
        help="Heads that look at the image: 'all'; a mapping of layers to lists of heads, both 0-based (layers that "
        "are not listed keep all); None: the list that `lmmhooks calibrate yopo` found; a path ending in .json: such a "
        "list. In all other heads the image is hidden from text, and visual rows attend to nothing.",
    )
    layer_cut: int | None = setting(
        None, help="First decoder layer in which nothing looks at the image, >= 0; None: none. Qwen2-VL-7B: 24."
    )
    renormalise_heads: bool = setting(
        False, help="Rows that lose the image in a head sum to 1 again. Released: False, their attention shrinks."
    )
    renormalise_cut: bool = setting(
        False, help="The same behind the layer cut. Released: False for LLaVA, True for Qwen2-VL."
    )

    def __post_init__(self) -> None:
        self._require(
            self.window is None or (self.window >= 1 and self.window % 2 == 1), "window", "odd and >= 1, or None"
        )
        self._require(self.layer_cut is None or self.layer_cut >= 0, "layer_cut", ">= 0 or None")
        if self.heads is not None and not isinstance(self.heads, str):
            object.__setattr__(self, "heads", self._head_list())
        named = not isinstance(self.heads, str) or self.heads == "all" or names_record(self.heads)
        self._require(
            named, "heads", "'all', a mapping of layers to lists of heads, a path that ends in .json, or None"
        )

    def _head_list(self) -> HeadList:
        pairs = self.heads.items() if isinstance(self.heads, Mapping) else self.heads
        try:
            listed = [(int(layer), tuple(sorted({int(head) for head in heads}))) for layer, heads in pairs]
        except (TypeError, ValueError):
            listed = None
        once = listed is not None and len({layer for layer, _ in listed}) == len(listed)
        self._require(once, "heads", "a mapping of layer numbers to lists of head numbers, such as {2: [0, 5]}")
        return tuple(sorted(listed or ()))

    def check(self, family: Any) -> None:
        depth, width = family.num_layers, family.num_heads
        self._require((self.layer_cut or 0) <= depth, "layer_cut", f"at most {depth}, the layers of this model")
        if isinstance(self.heads, tuple):
            fits = all(0 <= layer < depth and all(0 <= head < width for head in heads) for layer, heads in self.heads)
            self._require(fits, "heads", f"a list for this model, which has layers 0 to {depth - 1} of {width} heads")

    @property
    def is_identity(self) -> bool:
        return self.window is None and self.heads in ("all", ()) and self.layer_cut is None

    def active_heads(self, layer: int, family: Any) -> tuple[int, ...] | None:
        """Heads that look at the image in a layer; None for all of them."""
        kept: tuple[int, ...] | None = None if self.heads == "all" else dict(self.heads).get(layer)
        return None if kept is None or len(kept) == family.num_heads else kept

    # -- visual rows --------------------------------------------------------------------------------------------------

    def frozen_layers(self, family: Any) -> Sequence[int]:
        return () if self.layer_cut is None else range(self.layer_cut, family.num_layers)

    def sparse_layers(self, family: Any) -> Sequence[int]:
        below = range(family.num_layers if self.layer_cut is None else self.layer_cut)
        return [layer for layer in below if self.window is not None or self.active_heads(layer, family) is not None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: ComputeContext) -> Tensor | None:
        if "rows" not in context.plan:
            if self.window is not None and not context.tokens.placed:
                raise PromptError(f"{self.id}: where visual tokens lie in the image is not known here; use window=None")
            pairs = None if self.window is None else partial(neighbours, window=self.window, causal=self.causal)
            context.plan["rows"] = row_blocks(context.tokens, pairs)
        rows, heads = context.plan["rows"], self.active_heads(context.layer, context.family)
        if rows.is_causal and heads is None:
            return None
        context.memory[context.layer, context.sample] = rows.visual_pairs
        active = None if heads is None else torch.tensor(heads, dtype=torch.long, device=query.device)
        return attend_blocks(query, key, value, context.scaling, rows.blocks, active)

    # -- text rows and generated rows ---------------------------------------------------------------------------------

    def layers(self, family: Any) -> Sequence[int]:
        behind = set(self.frozen_layers(family))
        return [
            layer
            for layer in range(family.num_layers)
            if layer in behind or self.active_heads(layer, family) is not None
        ]

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        behind = self.layer_cut is not None and context.layer >= self.layer_cut
        active = () if behind else self.active_heads(context.layer, context.family)
        assert active is not None, "layers() lists those in which some head loses the image"
        lost = torch.tensor([head not in active for head in range(weights.shape[1])], device=weights.device)
        renormalise = self.renormalise_cut if behind else self.renormalise_heads
        return hide_image(weights, context.layout.visual, lost, renormalise)

    # -- cost ---------------------------------------------------------------------------------------------------------

    def layer_counts(
        self, family: Any, layer: int, sample: int, tokens: PromptTokens, memory: dict[Any, Any]
    ) -> LayerCounts:
        visual, text = tokens.num_visual, len(tokens) - tokens.num_visual
        if self.layer_cut is not None and layer >= self.layer_cut:
            return LayerCounts.frozen_visual(text, visual)
        if (layer, sample) not in memory:
            return LayerCounts.dense(text + visual)
        among = memory[layer, sample] if self.window is not None else visual**2
        counts = LayerCounts.neighbourhood(text, visual, among)
        heads = self.active_heads(layer, family)
        if heads is None:
            return counts
        # Visual rows attend in the active heads only; pairs count all heads together.
        of_visual = counts.pairs - text * (text + visual)
        return replace(counts, pairs=counts.pairs - of_visual * (1 - len(heads) / family.num_heads))
