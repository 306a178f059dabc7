"""
VMTC: keep the tokens the class token attends to most, and merge the rest into a few.

Redundant image tokens drown instructions about the answer's form; foreground tokens stay, the others are clustered and
each cluster becomes one token, the mean of its members weighted by their attention.

Paper: "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy",
arXiv 2411.15453; no code was published. UNVERIFIED, because only the abstract and reviews could be read: the shares of
kept and merged tokens, the clustering and its constants, and where merged tokens stand. The other half of the paper is
`cmai`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.merging import embed, feature_probes, features
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["VMTC", "cluster"]


@dataclass(frozen=True)
class VMTC(CropwiseMethod):
    """
    Primary tokens of every crop by class-token attention, and cluster means of the others, before the decoder.

    ``keep`` counts both; 0.375 is the proposed total. Features are merged as the projector takes them, and projected;
    where it does not take single patches, as the decoder takes them. A merged token takes the place of its member of
    highest attention. Clusters of identical tokens may end up empty; then fewer tokens stay. Towers without a class
    token are scored by received attention.
    """

    id: ClassVar[str] = "vmtc"
    paper: ClassVar[str] = "Enhancing Instruction-Following Capability by Reducing Image Redundancy, arXiv 2411.15453"

    primary: float = setting(
        2 / 3, help="Share of the kept tokens that stay as they are, in [0, 1]; the others are clusters (UNVERIFIED)."
    )
    iterations: int = setting(10, help="Rounds of k-means, >= 0 (UNVERIFIED).")
    layer: int | None = setting(
        None,
        help="Vision layer whose attention is read, 0-based. None: the layer whose output the projector takes, or the "
        "nearest one that sees the whole crop where there is no class token (UNVERIFIED).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.primary <= 1, "primary", "in [0, 1]")
        self._require(self.iterations >= 0, "iterations", ">= 0")

    def probes(self, family: Any) -> list[Probe]:
        return [saliency_probe(self, family, self.layer), *feature_probes(family)]

    def select(self, tokens: TokenGroup) -> Tensor:
        primary, rest, weights = self._divide(tokens)
        tokens.scratch["clusters"] = rest, weights
        heaviest = rest.gather(1, weights.argmax(dim=2))
        num_tokens = tokens.position.shape[1]
        # Empty clusters stand for nothing: past the end, so that they sort last, then fillers.
        slots = heaviest.masked_fill(weights.amax(dim=2) == 0, num_tokens)
        index = torch.cat([primary, slots], dim=1).sort(dim=1).values
        return index.masked_fill(index == num_tokens, -1)

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor | None:
        rest, weights = tokens.scratch["clusters"]
        if not weights.shape[1]:
            return None
        values = features(tokens)
        members = values.gather(1, rest[..., None].expand(-1, -1, values.shape[2]))
        means = embed(tokens, (weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-30)) @ members)
        place = rest.gather(1, weights.argmax(dim=2))
        # Every token starts as itself; clusters overwrite their slots.
        states = tokens.states.to(means.dtype)
        whole = weights.amax(dim=2) > 0
        current = states.gather(1, place[..., None].expand_as(means))
        states = states.scatter(1, place[..., None].expand_as(means), torch.where(whole[..., None], means, current))
        return states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, states.shape[2]))

    def _divide(self, tokens: TokenGroup) -> tuple[Tensor, Tensor, Tensor]:
        """Primary tokens ``[G, P]``, the others ``[G, R]``, and their weights in each cluster ``[G, C, R]``."""
        attention = tokens.probes[self.probes(tokens.family)[0].name]
        num_primary = round(self.primary * tokens.num_keep)
        num_clusters = tokens.num_keep - num_primary
        falling = attention.sort(dim=1, descending=True, stable=True).indices
        primary, rest = falling[:, :num_primary].sort(dim=1).values, falling[:, num_primary:].sort(dim=1).values
        importance = attention.gather(1, rest).clamp(min=1e-30)
        if not num_clusters:
            return primary, rest, importance[:, None][:, :0]
        values = features(tokens)
        others = values.gather(1, rest[..., None].expand(-1, -1, values.shape[2]))
        member = cluster(others, importance.argmax(dim=1, keepdim=True), num_clusters, self.iterations)
        return primary, rest, member * importance[:, None]


@torch.no_grad()
def cluster(features: Tensor, first: Tensor, number: int, iterations: int) -> Tensor:
    """
    K-means by cosine, without randomness.

    The first centre is given, each further one is the token least similar to its nearest centre; a cluster that loses
    all members keeps its centre.

    Parameters
    ----------
    features
        ``[G, R, C]``.
    first
        ``[G, 1]`` long: the token that is the first centre.
    number
        Clusters, at most R.
    iterations
        Rounds in which centres become means of their members.

    Returns
    -------
    Tensor
        ``[G, number, R]`` float32: 1 where a token belongs to a cluster, else 0.
    """
    tokens = normalize(features.float(), dim=2)
    centre = first
    centres = tokens.new_empty(len(tokens), number, tokens.shape[2])
    nearest = tokens.new_full(tokens.shape[:2], -torch.inf)
    for i in range(number):
        centres[:, i : i + 1] = tokens.gather(1, centre[..., None].expand(-1, -1, tokens.shape[2]))
        similarity = torch.bmm(tokens, centres[:, i, :, None])[..., 0]
        nearest = torch.maximum(nearest, similarity).scatter_(1, centre, torch.inf)
        centre = nearest.argmin(dim=1, keepdim=True)
    for _ in range(iterations):
        member = _members(tokens, centres)
        means = normalize(member @ tokens, dim=2)
        centres = torch.where(member.sum(dim=2, keepdim=True) > 0, means, centres)
    return _members(tokens, centres)


def _members(tokens: Tensor, centres: Tensor) -> Tensor:
    nearest = (centres @ tokens.transpose(1, 2)).argmax(dim=1, keepdim=True)
    return torch.zeros(nearest.shape[0], centres.shape[1], nearest.shape[2], device=tokens.device).scatter_(
        1, nearest, 1.0
    )
