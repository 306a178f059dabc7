"""
SCOPE: keep tokens that add most to the coverage of all tokens, weighted by how salient they are.

Saliency alone keeps near-duplicates of one object; here every further token counts only for what those kept so far do
not resemble (facility location), times the attention of the class token.

Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", NeurIPS 2025, arXiv 2510.24214.
Code: github.com/kinredon/SCOPE (no licence; implemented from its description). Differs from the released code in
float32 similarities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.greedy import cosine, cover
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["SCOPE"]


@dataclass(frozen=True)
class SCOPE(CropwiseMethod):
    """
    Saliency-weighted facility location in every crop, in raster order, before the decoder.

    Similarity is between patches as the projector takes them; where a token is made of several patches, between merged
    tokens, as a third-party evaluation on Qwen2.5-VL does. Towers without a class token are scored by received
    attention. Published ``keep`` on LLaVA-1.5: 192, 128, 64.
    """

    id: ClassVar[str] = "scope"
    paper: ClassVar[str] = "SCOPE: Saliency-Coverage Oriented Token Pruning, NeurIPS 2025, arXiv 2510.24214"
    code: ClassVar[str] = "https://github.com/kinredon/SCOPE"

    alpha: float = setting(1.0, help="Power of the saliency, >= 0 (released: 1.0); 0 leaves coverage alone.")
    mode: Literal["multiply", "add"] = setting(
        "multiply",
        help="How saliency and the gain in coverage combine; released default: 'multiply'. 'add' takes the sum over "
        "heads, as released.",
    )
    layer: int | None = setting(
        None,
        help="Vision layer whose attention is the saliency, 0-based. None: the layer whose output the projector takes, "
        "or the nearest one that sees the whole crop where there is no class token.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", ">= 0")
        self._require(self.mode in ("multiply", "add"), "mode", "'multiply' or 'add'")

    def probes(self, family: Any) -> list[Probe]:
        saliency = saliency_probe(self, family, self.layer)
        return [saliency, Probe("vision_states", family.feature_layer)] if family.projects_patches else [saliency]

    def select(self, tokens: TokenGroup) -> Tensor:
        attention, *patches = tokens.probes.values()
        similarity = cosine(patches[0] if patches else tokens.states)
        if self.mode == "multiply":
            order = cover(similarity, tokens.num_keep, factor=attention**self.alpha)
        else:
            (probe, *_) = self.probes(tokens.family)
            heads = tokens.family.attention_of(tokens.family.vision_layers[probe.layer]).num_heads
            order = cover(similarity, tokens.num_keep, offset=(heads * attention) ** self.alpha)
        return order.sort(dim=1).values
