"""
FasterVLM: keep the patches that the class token of the vision tower attends to most.

Attention from text to image inside the decoder is biased to late positions and diffuse; the class token's is
concentrated, and known before the decoder runs.

Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
arXiv 2412.01818 v1. Code: github.com/Theia-4869/FasterVLM (Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.selection import top_ascending
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["FasterVLM"]


@dataclass(frozen=True)
class FasterVLM(CropwiseMethod):
    """
    Top tokens of every crop by class-token attention, head mean, in raster order, before the decoder.

    Published settings on LLaVA-1.5: ``keep`` 432, 288, 144, 58, 29. On LLaVA-NeXT the paper counts per crop
    (``keep_per='crop'``) and packs without newline tokens (``newline='drop'``) and without unpadding, which this
    toolkit does not undo: crops that the model unpadded have fewer candidates.

    Towers without a class token (SigLIP, Qwen) are scored by the mean attention a patch receives in a layer that sees
    the whole crop: the substitute that follow-up work uses, UNVERIFIED for this method.
    """

    id: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning, arXiv 2412.01818 v1"
    code: ClassVar[str] = "https://github.com/Theia-4869/FasterVLM"

    layer: int | None = setting(
        None,
        help="Vision layer whose attention is read, 0-based. None: the layer whose output the projector takes (22 in "
        "CLIP-L, the paper's choice), or the nearest one that sees the whole crop where there is no class token.",
    )

    def probes(self, family: Any) -> list[Probe]:
        return [saliency_probe(self, family, self.layer)]

    def select(self, tokens: TokenGroup) -> Tensor:
        (scores,) = tokens.probes.values()
        return top_ascending(scores, tokens.num_keep)
