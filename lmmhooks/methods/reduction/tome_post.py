"""
ToMe behind the tower: merge the most similar visual tokens once, before the decoder.

For towers inside which nothing can merge (windows, patches that are joined in pairs), and what papers on pruning
may have run as "ToMe" elsewhere. Nobody has published how: the compared keys, the place and the rounds are this
toolkit's convention, UNVERIFIED. It saves nothing inside the tower; see `tome` for the published method.

Paper: "Token Merging: Your ViT but Faster", ICLR 2023, arXiv 2210.09461.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.tome import match_tokens, merge_tokens
from lmmhooks.methods.vision_scores import mean_key

__all__ = ["ToMePost", "merge_rounds"]


@dataclass(frozen=True)
class ToMePost(CropwiseMethod):
    """
    Bipartite soft matching of every crop's tokens by keys of a vision layer, mean over heads and patches of a token.

    One round merges at most half of the tokens; what is left to merge takes further rounds. A merged token is the mean
    of the projected tokens it stands for, at the place of the first of them.
    """

    id: ClassVar[str] = "tome-post"
    paper: ClassVar[str] = "Token Merging: Your ViT but Faster, ICLR 2023, arXiv 2210.09461"
    code: ClassVar[str] = "https://github.com/facebookresearch/ToMe"

    layer: int | None = setting(
        None,
        help="Vision layer whose keys are compared, 0-based. None: the last one that sees the whole crop and feeds "
        "the projector.",
    )

    def check(self, family: Any) -> None:
        super().check(family)
        depth = len(family.vision_layers)
        self._require(self.layer is None or 0 <= self.layer < depth, "layer", f"a vision layer, 0 to {depth - 1}")

    def probes(self, family: Any) -> list[Probe]:
        return [Probe("vision_keys", self._layer(family))]

    def _layer(self, family: Any) -> int:
        if self.layer is not None:
            return self.layer
        return max(layer for layer in family.full_attention_vision_layers if layer <= family.feature_layer)

    def select(self, tokens: TokenGroup) -> Tensor:
        return merge_rounds(self._metric(tokens), tokens.states[..., :0], tokens.num_keep)[1]

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor:
        return merge_rounds(self._metric(tokens), tokens.states, tokens.num_keep)[0]

    def _metric(self, tokens: TokenGroup) -> Tensor:
        (keys,) = tokens.probes.values()
        return mean_key(keys, tokens.family, self._layer(tokens.family))


def merge_rounds(metric: Tensor, states: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """
    Merge tokens until K are left.

    Parameters
    ----------
    metric
        ``[G, V, d]`` float32: what is compared; a merged token has the mean of its members.
    states
        ``[G, V, C]``, merged along in float32.
    num_keep
        K.

    Returns
    -------
    tuple
        ``[G, K, C]`` means of the members, in the dtype of ``states``; ``[G, K]`` long, ascending: the first member.
    """
    groups, length, width = metric.shape
    both = torch.cat([metric, states.to(metric.dtype)], dim=-1)
    size = metric.new_ones(groups, length)
    origin = torch.arange(length, device=metric.device).expand(groups, -1)
    while (length := both.shape[1]) > num_keep:
        matched = match_tokens(both[..., :width], min(length - num_keep, length // 2), has_cls=False)
        both, size, origin = merge_tokens(both, size, origin, *matched)
        # Raster order again, so that the halves of the next round are neighbours as in the first.
        origin, order = origin.sort(dim=1)
        size = size.gather(1, order)
        both = both.gather(1, order[..., None].expand_as(both))
    return both[..., width:].to(states.dtype), origin
