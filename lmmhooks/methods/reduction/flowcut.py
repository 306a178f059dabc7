"""
FlowCut: prune in many small steps inside the vision tower, by a score that accumulates over its layers.

A patch counts by what the class token attends to, by how similar its value is to the class token's, and by the size of
its value. Every second layer prunes; how much follows the entropy of the class token's attention: where it is spread
evenly, nothing leaves yet.

Paper: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", NeurIPS 2025,
arXiv 2505.19536. Code: github.com/TungChintao/FlowCut (Apache-2.0; written from its description). Differs from the
release where several crops are encoded at once: the release prunes all of them by the largest step of the batch, which
would let one image depend on its neighbours; here every crop takes its own step. They end with equally many. The second
stage of its LLaVA-NeXT setting, inside the decoder, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.tower import TowerMethod, TowerStep, TowerTokens

__all__ = ["FlowCut", "flow_scores", "step_sizes"]


@dataclass(frozen=True)
class FlowCut(TowerMethod):
    """
    Progressive pruning on the outputs of vision layers, down to ``keep`` before the layer that feeds the projector.

    Published on LLaVA-1.5: ``keep`` 192, 128, 64.
    """

    id: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = "FlowCut: Rethinking Redundancy via Information Flow, NeurIPS 2025, arXiv 2505.19536"
    code: ClassVar[str] = "https://github.com/TungChintao/FlowCut"
    after = "layer"
    needs_cls = "whose flow of information is what it follows"

    momentum: float = setting(0.5, help="Weight of the score of earlier layers in the accumulated one, in [0, 1).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.keep is not None, "keep", "a token count >= 1 or a share in (0, 1]; give one")
        self._require(0 <= self.momentum < 1, "momentum", "in [0, 1)")

    def check(self, family: Any) -> None:
        super().check(family)
        self._require(family.feature_layer > 0, "keep", "used on towers that feed the projector from layer 1 or later")

    def tower_layers(self, family: Any) -> Sequence[int]:
        # The last step comes right before the layer whose output the projector takes.
        return range(family.feature_layer)

    def reduce(self, tokens: TowerTokens) -> TowerStep | None:
        target = self.target(tokens.num_patches)
        num_left = tokens.states.shape[1] - 1
        if num_left <= target:
            return None
        attention = tokens.saliency.mean(dim=1)
        scores = flow_scores(attention, tokens.value, tokens.valid)
        if (before := tokens.memory.get("scores")) is not None:
            scores = self.momentum * before + (1 - self.momentum) * scores
        tokens.memory["scores"] = scores
        remaining = tokens.family.feature_layer - tokens.layer - 1
        if remaining % 2:
            return None
        if tokens.valid is None:
            count = torch.full_like(tokens.origin[:, 0], num_left)
        else:
            count = tokens.valid[:, 1:].sum(dim=1)
            scores = scores.masked_fill(~tokens.valid[:, 1:], -torch.inf)
        left = torch.full_like(count, target)
        if remaining:
            left = (count - step_sizes(attention, count, target, remaining)).clamp(min=target)
        ranks = scores.sort(dim=1, descending=True, stable=True).indices
        best = torch.arange(num_left, device=ranks.device) < left[:, None]
        mask = torch.zeros_like(best).scatter(1, ranks, best)
        step, index = tokens.keep(torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1))
        tokens.memory["scores"] = tokens.memory["scores"].gather(1, index[:, 1:] - 1)
        return step


def flow_scores(attention: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
    """
    Scores of one layer.

    Parameters
    ----------
    attention
        ``[G, P]`` float32: class attention to the patches, head mean.
    value
        ``[G, H, 1 + P, d]``, class token first.
    valid
        ``[G, 1 + P]`` bool: no padding; None where there is none.

    Returns
    -------
    Tensor
        ``[G, P]`` float32: attention plus similarity of values (softmax over all tokens of the unscaled products with
        the class token's, head mean), each normalised over the patches, times the L1 norm of the head-mean value.
    """
    value = value.float()
    products = (value[:, :, :1] @ value.transpose(2, 3)).squeeze(2)
    if valid is not None:
        products = products.masked_fill(~valid[:, None], -torch.inf)
    similarity = products.softmax(dim=-1).mean(dim=1)[:, 1:]
    size = value.mean(dim=1)[:, 1:].abs().sum(dim=-1)
    shares = attention / attention.sum(dim=1, keepdim=True) + similarity / similarity.sum(dim=1, keepdim=True)
    return shares * size


def step_sizes(attention: Tensor, count: Tensor, target: int, remaining: int) -> Tensor:
    """
    Patches to prune now.

    Parameters
    ----------
    attention
        ``[G, P]`` float32, zeros for padding.
    count
        ``[G]`` long: patches without padding.
    target
        Patches to end with.
    remaining
        Layers still to come before the one that feeds the projector, at least 1.

    Returns
    -------
    Tensor
        ``[G]`` long: the distance to the target over the root of ``remaining``, times one minus the square of the
        attention's entropy as a share of what it could be.
    """
    shares = attention / attention.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=1)
    # A single patch has no entropy to compare with; it is the target then.
    evenness = entropy / count.clamp(min=2).float().log()
    return ((count - target) / remaining**0.5 * (1 - evenness**2)).round().clamp(min=0).long()
