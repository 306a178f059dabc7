"""Clusters by density peaks (DPC-KNN), as used to merge tokens that were pruned; deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cluster_means", "density_peaks"]


def density_peaks(states: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """
    Group vectors around those that are dense and far from denser ones.

    Parameters
    ----------
    states
        ``[G, M, D]``.
    num_clusters
        C, at most M; also the number of nearest neighbours, itself included, that density looks at.

    Returns
    -------
    tuple
        Centres ``[G, C]`` long, best first, and the cluster of every vector ``[G, M]`` long. Of equally dense vectors
        the one of lower index counts as denser: published code adds random noise instead.
    """
    states = states.float()
    # Differences themselves, not the product form: equal vectors must be at distance 0.
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[-1] ** 0.5
    nearest = distance.sort(dim=-1).values[..., :num_clusters]
    density = torch.exp(-(nearest**2).mean(dim=-1))
    place = torch.arange(density.shape[1], device=density.device)
    mine, others = density[:, :, None], density[:, None, :]
    denser = (others > mine) | ((others == mine) & (place[None, :] < place[:, None]))
    farthest = distance.flatten(1).amax(dim=1)[:, None, None]
    separation = torch.where(denser, distance, farthest).amin(dim=-1)
    centres = (density * separation).sort(dim=1, descending=True, stable=True).indices[:, :num_clusters]
    to_centres = distance.gather(2, centres[:, None].expand(-1, distance.shape[1], -1))
    # argmin leaves open which of equal distances wins; a stable sort does not.
    cluster = to_centres.sort(dim=-1, stable=True).indices[..., 0]
    own = torch.arange(num_clusters, device=density.device).expand_as(centres)
    return centres, cluster.scatter(1, centres, own)


def cluster_means(states: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """
    Mean of every cluster.

    Parameters
    ----------
    states
        ``[G, M, D]``.
    cluster
        ``[G, M]`` long.
    num_clusters
        C; each has a member.

    Returns
    -------
    Tensor
        ``[G, C, D]`` float32. As in published code the divisor is larger than the number of members by 1e-6.
    """
    members = torch.nn.functional.one_hot(cluster, num_clusters).float()
    return (members / (members.sum(dim=1, keepdim=True) + 1e-6)).transpose(1, 2) @ states.float()
