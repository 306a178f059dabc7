"""
VisionZip: a few dominant tokens as they are, and the rest summed up in a handful of contextual ones.

Dominant are the class token and the patches it attends to most. Of the others every n-th becomes a contextual token,
to which the mean of those whose keys resemble its own is added.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467. Code:
github.com/dvlab-research/VisionZip (Apache-2.0). As there, the mean is added to the target's feature, which about
doubles its norm (``contextual_merge``), and the class token goes through the projector (``keep_cls``). Differs from the
released code for any-resolution images, where the class and contextual tokens of all tiles come last: here the tokens
of a tile take, in their order, the places that its tokens have in the mosaic; and tiles that the model unpadded have
fewer candidates. Fine-tuned variants are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.merging import embed, feature_probes, features, merges_before_projector
from lmmhooks.methods.reduction.selection import ascending_indices, top_ascending
from lmmhooks.methods.vision_scores import mean_key, saliency_probe

__all__ = ["VisionZip", "contextual_features", "target_places"]


@dataclass(frozen=True)
class VisionZip(CropwiseMethod):
    """
    Dominant tokens in raster order, the class token first, then contextual ones, before the decoder.

    ``keep`` counts all of them. Published: 192, 128, 64 on LLaVA-1.5; as many as 128, 64, 32 per crop
    (``keep_per='crop'``) on LLaVA-NeXT. An image that keeps all its tokens is left alone.

    Where several patches make a token (Qwen, InternVL, OneVision) whole tokens are chosen and their states merged, and
    there is no class token in the prompt; towers without one are scored by the attention a patch receives: UNVERIFIED,
    as the authors' port to Qwen2.5-VL was not read. A contextual token has the position of its target, the class token
    that of the first token it displaces.
    """

    id: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip: Longer is Better but Not Necessary, CVPR 2025, arXiv 2412.04467"
    code: ClassVar[str] = "https://github.com/dvlab-research/VisionZip"

    contextual: int | float = setting(
        10 / 64,
        help="Contextual tokens of a crop: a count, or a share in [0, 1) of what it keeps, rounded half to even; at "
        "least one token stays dominant. 10 of 64 is released; 30 of 192 and 20 of 128 (commonly quoted, UNVERIFIED) "
        "and 5 of 32 are the same share.",
    )
    contextual_merge: Literal["add", "mean"] = setting(
        "add", help="'add' the mean of its tokens to the target, as released, or take the 'mean' of all of them."
    )
    keep_cls: bool = setting(
        True,
        help="Keep the class token as one of the dominant ones, as released, where there is one and single patches are "
        "projected.",
    )
    layer: int | None = setting(
        None,
        help="Vision layer whose attention and keys are read, 0-based. None: the layer whose output the projector "
        "takes (22 in CLIP-L, as published), or the nearest one that sees the whole crop where there is no class "
        "token.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.contextual, float) and 0 <= self.contextual < 1
        count = isinstance(self.contextual, int) and not isinstance(self.contextual, bool) and self.contextual >= 0
        self._require(share or count, "contextual", "a token count >= 0 or a share in [0, 1)")
        self._require(self.contextual_merge in ("add", "mean"), "contextual_merge", "'add' or 'mean'")

    def probes(self, family: Any) -> list[Probe]:
        attention = saliency_probe(self, family, self.layer)
        probes = [attention, Probe("vision_keys", attention.layer), *feature_probes(family)]
        if self._joins(family):
            probes.append(Probe("vision_cls_state", family.feature_layer))
        return probes

    def _joins(self, family: Any) -> bool:
        """Whether the class token goes to the decoder."""
        return self.keep_cls and family.has_cls and merges_before_projector(family)

    def _num_contextual(self, num_keep: int) -> int:
        wanted = self.contextual
        return min(round(wanted * num_keep) if isinstance(wanted, float) else wanted, num_keep - 1)

    def select(self, tokens: TokenGroup) -> Tensor:
        attention = tokens.probes[self.probes(tokens.family)[0].name]
        num_contextual, num_cls = self._num_contextual(tokens.num_keep), int(self._joins(tokens.family))
        dominant = top_ascending(attention, tokens.num_keep - num_contextual - num_cls)
        is_rest = torch.ones_like(attention, dtype=torch.bool).scatter(1, dominant, False)
        rest = ascending_indices(is_rest, attention.shape[1] - dominant.shape[1])
        places = target_places(rest.shape[1], num_contextual)
        # The class token has no place of its own among the visual tokens; it takes that of one that leaves.
        free = next(place for place in range(rest.shape[1]) if place not in places)
        return torch.cat([rest[:, free : free + num_cls], dominant, rest[:, places]], dim=1)

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor | None:
        num_contextual, num_cls = self._num_contextual(tokens.num_keep), int(self._joins(tokens.family))
        if num_contextual + num_cls == 0:
            return None
        dominant = index[:, num_cls : index.shape[1] - num_contextual]
        parts = [tokens.states.gather(1, dominant[..., None].expand(-1, -1, tokens.states.shape[-1]))]
        if num_cls:
            own = tokens.probes[Probe("vision_cls_state", tokens.family.feature_layer).name][:, :1]
            parts.insert(0, embed(tokens, own))
        if num_contextual:
            keys = self.probes(tokens.family)[1]
            metric = mean_key(tokens.probes[keys.name], tokens.family, keys.layer)
            targets = index[:, index.shape[1] - num_contextual :]
            average = self.contextual_merge == "mean"
            parts.append(embed(tokens, contextual_features(features(tokens), metric, dominant, targets, average)))
        return torch.cat(parts, dim=1)


def target_places(num_rest: int, num_contextual: int) -> list[int]:
    """Which of the tokens that are not dominant become contextual: every n-th from the first on."""
    if num_contextual == 0:
        return []
    step = max(1, num_rest // num_contextual)
    return list(range(0, num_rest, step))[:num_contextual]


def contextual_features(
    features: Tensor, metric: Tensor, dominant: Tensor, targets: Tensor, average: bool = False
) -> Tensor:
    """
    Targets with what resembles them.

    Parameters
    ----------
    features
        ``[G, V, C]``.
    metric
        ``[G, V, d]``: what tokens are compared by, with the cosine.
    dominant, targets
        ``[G, K]`` and ``[G, T]`` long; all other tokens are merged, each into the target it resembles most, the first
        one of two.
    average
        Mean of the target and its tokens; otherwise the target plus the mean of its tokens.

    Returns
    -------
    Tensor
        ``[G, T, C]``; a target that nothing resembles is itself.
    """
    unit = F.normalize(metric, dim=-1)
    num_targets = targets.shape[1]
    likeness = unit @ unit.gather(1, targets[..., None].expand(-1, -1, unit.shape[-1])).transpose(1, 2)
    numbers = torch.arange(num_targets, device=features.device)
    nearest = torch.where(likeness == likeness.amax(dim=-1, keepdim=True), numbers, num_targets).amin(dim=-1)
    merges = torch.ones(features.shape[:2], device=features.device)
    merges = merges.scatter(1, torch.cat([dominant, targets], dim=1), 0.0)
    assigned = (nearest[..., None] == numbers) * merges[..., None]
    own = features.gather(1, targets[..., None].expand(-1, -1, features.shape[-1]))
    summed, count = assigned.transpose(1, 2) @ features, assigned.sum(dim=1)[..., None]
    return (own + summed) / (1 + count) if average else own + summed / count.clamp(min=1)
