"""
VTC-CLS: class-token attention of several late vision layers, added up.

Single layers miss tokens that others find; the sum over a range of them misses fewer.

Paper: "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819.
Code: github.com/THU-MIG/VTC-CLS (Apache-2.0), for one image of one crop; here every crop is scored on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.selection import top_ascending
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["VTCCLS"]


@dataclass(frozen=True)
class VTCCLS(CropwiseMethod):
    """
    Top tokens of every crop by class-token attention, head mean, summed over vision layers ``start`` to the one whose
    output the projector takes, in raster order, before the decoder.

    Published on LLaVA-1.5 with ``keep`` 256, 128 and 64 (released default: 36). With ``start`` at the last of these
    layers it is `fastervlm`. Towers without a class token (SigLIP, Qwen) are scored by the attention a patch receives
    in those layers of the range that see the whole crop (23 and 31 in Qwen2.5-VL): UNVERIFIED for this method. Crops
    that a model unpadded (LLaVA-NeXT) have fewer candidates than the whole tile.
    """

    id: ClassVar[str] = "vtc-cls"
    paper: ClassVar[str] = "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv 2412.05819"
    code: ClassVar[str] = "https://github.com/THU-MIG/VTC-CLS"

    start: int | None = setting(
        None,
        help="First vision layer of the sum, 0-based; the last is the one whose output the projector takes. None: two "
        "thirds of the tower's depth, 16 of CLIP-L's 24, the default of the released scripts.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.start is None or self.start >= 0, "start", "a vision layer >= 0, or None")

    def layers(self, family: Any) -> list[int]:
        """Vision layers that are summed, 0-based."""
        last = family.feature_layer
        seeing = range(last + 1) if family.has_cls else [i for i in family.full_attention_vision_layers if i <= last]
        start = min(2 * len(family.vision_layers) // 3, seeing[-1]) if self.start is None else self.start
        layers = [layer for layer in seeing if layer >= start]
        if not layers:
            raise MethodError(
                f"{self.id}: start={start} leaves no vision layer of {family.name} to sum; the last one that counts is "
                f"{seeing[-1]}"
            )
        return layers

    def probes(self, family: Any) -> list[Probe]:
        return [saliency_probe(self, family, layer, name="start") for layer in self.layers(family)]

    def select(self, tokens: TokenGroup) -> Tensor:
        scores = torch.stack([tokens.probes[probe.name] for probe in self.probes(tokens.family)]).sum(dim=0)
        return top_ascending(scores, tokens.num_keep)
