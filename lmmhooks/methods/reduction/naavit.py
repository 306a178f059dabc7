"""
NAAViT: no attention among visual tokens. Text looks at everything, visual tokens do not look at each other.

SAISA trains models whose decoders never let visual tokens attend to visual tokens. This is the training-free use of the
idea on a model as it is: chosen layers compute visual rows over the text before them only (``vv='none'``), and besides
over themselves ('self') or over the cells around them ('neighbor', see `yopo`); 'frozen' rows attend to nothing and
have no feed-forward part either (see `shortv`). The rows are split, so that pairs that nobody looks at cost nothing.

No figures without training are published for it: all is UNVERIFIED, and layers had better be chosen than all taken.
EE-MLLM's composite attention, a trained relative, is left out: no code of it could be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lmmhooks.cost import LayerCounts
from lmmhooks.errors import PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.compute import ComputeContext, ComputeMethod, PromptTokens, layers_inside
from lmmhooks.methods.reduction.sparse import (
    attend_blocks,
    earlier_images,
    neighbours,
    no_pairs,
    own,
    row_blocks,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NAAViT", "visual_pairs"]


def visual_pairs(tokens: PromptTokens, rows: Tensor, vv: str, cross_image: bool, window: int, causal: bool) -> Tensor:
    """
    Which visual keys visual rows see.

    Parameters
    ----------
    tokens, rows
        As for `lmmhooks.methods.reduction.sparse.seen_keys`.
    vv, window, causal
        As the settings of `NAAViT`.
    cross_image
        Whether later images see earlier ones.

    Returns
    -------
    Tensor
        ``[R, n]`` bool.
    """
    if vv == "neighbor":
        pairs = neighbours(tokens, rows, window, causal)
    else:
        pairs = own(tokens, rows) if vv == "self" else no_pairs(tokens, rows)
    return pairs | earlier_images(tokens, rows) if cross_image else pairs


@dataclass(frozen=True)
class NAAViT(ComputeMethod):
    """No attention among visual tokens (see the module docstring)."""

    id: ClassVar[str] = "naavit"
    paper: ClassVar[str] = "SAISA: Towards MLLMs with Both Training and Inference Efficiency, arXiv 2502.02458"
    code: ClassVar[str] = "https://github.com/icip-cas/SAISA"

    layers: tuple[int, ...] | None = setting(
        None,
        help="Decoder layers, 0-based; None: all, as in the trained model. Without training, the deepest 60 % by layer "
        "contribution are recommended (UNVERIFIED): take those of `lmmhooks calibrate shortv`.",
    )
    vv: Literal["none", "self", "neighbor", "frozen"] = setting(
        "none",
        help="What a visual row sees besides the text before it: 'none', 'self', 'neighbor' cells of its crop; "
        "'frozen': it sees nothing and has no feed-forward part. A row that would see nothing sees itself.",
    )
    cross_image: Literal["none", "causal"] = setting(
        "none", help="Whether visual rows see the images before their own; without meaning for vv='frozen'."
    )
    window: int = setting(5, help="For vv='neighbor': side of the square of cells, odd and >= 1.")
    causal: bool = setting(False, help="For vv='neighbor': only cells before a row, not those behind it.")

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        self._require(self.vv in ("none", "self", "neighbor", "frozen"), "vv", "'none', 'self', 'neighbor' or 'frozen'")
        self._require(self.cross_image in ("none", "causal"), "cross_image", "'none' or 'causal'")
        self._require(self.window >= 1 and self.window % 2 == 1, "window", "odd and >= 1")

    def check(self, family: Any) -> None:
        layers_inside(self, "layers", family)

    @property
    def is_identity(self) -> bool:
        return self.layers == ()

    def frozen_layers(self, family: Any) -> Sequence[int]:
        return self._layers(family) if self.vv == "frozen" else ()

    def sparse_layers(self, family: Any) -> Sequence[int]:
        return () if self.vv == "frozen" else self._layers(family)

    def _layers(self, family: Any) -> Sequence[int]:
        return range(family.num_layers) if self.layers is None else self.layers

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: ComputeContext) -> Tensor | None:
        if "rows" not in context.plan:
            if self.vv == "neighbor" and not context.tokens.placed:
                raise PromptError(f"{self.id}: where visual tokens lie in the image is not known here; use vv='self'")
            pairs = partial(
                visual_pairs,
                vv=self.vv,
                cross_image=self.cross_image == "causal",
                window=self.window,
                causal=self.causal,
            )
            context.plan["rows"] = row_blocks(context.tokens, pairs)
        rows = context.plan["rows"]
        context.memory[context.layer, context.sample] = rows.text_pairs + rows.visual_pairs
        return attend_blocks(query, key, value, context.scaling, rows.blocks)

    def layer_counts(
        self, family: Any, layer: int, sample: int, tokens: PromptTokens, memory: dict[Any, Any]
    ) -> LayerCounts:
        num, text = len(tokens), len(tokens) - tokens.num_visual
        if self.vv == "frozen":
            return LayerCounts.frozen_visual(text, tokens.num_visual)
        return LayerCounts(num, num, num, num, text * num + memory[layer, sample], num)
