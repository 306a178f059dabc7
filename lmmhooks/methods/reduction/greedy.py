"""
Greedy choices of a diverse or covering subset, shared by methods: far apart, spanning much, leaving nothing uncovered.

K steps over running buffers, nothing brought to the host in between; the lower index wins a tie. G groups at once, V
tokens of a group, K chosen ones. Selections for a smaller K are beginnings of those for a larger one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cosine", "cover", "max_min", "spanning"]

#: Share of a token's own kernel value below which what the chosen ones leave of it is float32 round-off.
SPENT = 1e-7
#: Rows that are multiplied at once where a matrix of similarities is large.
BLOCK = 1024


@torch.no_grad()
def cosine(features: Tensor, others: Tensor | None = None) -> Tensor:
    """
    Cosine similarities in float32.

    Parameters
    ----------
    features
        ``[G, M, D]``, any dtype.
    others
        ``[G, V, D]``; None: the features themselves.

    Returns
    -------
    Tensor
        ``[G, M, V]``; a vector of zeros is similar to nothing.
    """
    one = torch.nn.functional.normalize(features.float(), dim=-1)
    if others is not None:
        return one @ torch.nn.functional.normalize(others.float(), dim=-1).transpose(1, 2)
    similarity = _gram(one)
    # A token is as similar to itself as any other is: where that decides, round-off must not.
    similarity.diagonal(dim1=1, dim2=2).round_()
    return similarity


def _gram(vectors: Tensor) -> Tensor:
    """``[G, V, V]`` products of ``[G, V, D]``; of many, one half is computed and mirrored."""
    groups, size = vectors.shape[:2]
    if size <= 2 * BLOCK:
        return vectors @ vectors.transpose(1, 2)
    products = vectors.new_empty(groups, size, size)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        part = torch.matmul(vectors[:, start:stop], vectors[:, start:].transpose(1, 2))
        products[:, start:stop, start:] = part
        products[:, stop:, start:stop] = part[:, :, stop - start :].transpose(1, 2)
    return products


@torch.no_grad()
def max_min(distance: Tensor, num_keep: int) -> Tensor:
    """
    Tokens far from each other: first the one whose nearest neighbour is farthest, then farthest from all chosen ones.

    Parameters
    ----------
    distance
        ``[G, V, V]``, symmetric; its diagonal is overwritten.
    num_keep
        K, at most V.

    Returns
    -------
    Tensor
        ``[G, K]`` long, in the order chosen.
    """
    diagonal = distance.diagonal(dim1=1, dim2=2)
    diagonal.fill_(torch.inf)
    nearest = distance.amin(dim=1)
    # From here on a token's distance to itself rules it out, so that nothing has to be masked.
    diagonal.fill_(-torch.inf)
    order = torch.empty(len(distance), num_keep, dtype=torch.long, device=distance.device)
    for step in range(num_keep):
        best = nearest.argmax(dim=1, keepdim=True)
        order[:, step : step + 1] = best
        row = _rows(distance, best)[:, 0]
        nearest = torch.minimum(nearest, row) if step else row
    return order


@torch.no_grad()
def spanning(kernel: Tensor, num_keep: int) -> Tensor:
    """
    Greedy maximum of the determinant of the chosen part of a kernel (a determinantal point process).

    The fast exact algorithm of Chen et al. (NeurIPS 2018, arXiv 1709.05135): row by row of a Cholesky factor. Once the
    chosen tokens span all others (K above the rank), the rest follows by what round-off leaves of each.

    Parameters
    ----------
    kernel
        ``[G, V, V]`` float32, symmetric, positive semidefinite.
    num_keep
        K, at most V.

    Returns
    -------
    Tensor
        ``[G, K]`` long, in the order chosen.
    """
    groups, size = kernel.shape[:2]
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    least = SPENT * left
    factors = kernel.new_empty(groups, num_keep, size)
    order = torch.empty(groups, num_keep, dtype=torch.long, device=kernel.device)
    for step in range(num_keep):
        best = left.argmax(dim=1, keepdim=True)
        order[:, step : step + 1] = best
        row = _rows(kernel, best)
        if step:
            past = factors[:, :step]
            own = past.gather(2, best[:, None].expand(-1, step, -1))
            row = torch.baddbmm(row, own.transpose(1, 2), past, alpha=-1)
        variance = left.gather(1, best)
        # Dividing by round-off would spread it over all tokens until nothing finite is left.
        usable = variance > least.gather(1, best)
        factor = torch.where(usable, row[:, 0] / variance.clamp(min=1e-30).sqrt(), 0)
        factors[:, step] = factor
        left = (left - factor.square()).scatter_(1, best, -torch.inf)
    return order


@torch.no_grad()
def cover(rows: Tensor, num_keep: int, factor: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """
    Tokens that cover most: each step adds the one that raises the sum over rows of the best entry chosen most.

    Parameters
    ----------
    rows
        ``[G, R, V]`` float32: how well each token covers each of R things; negative entries count as 0.
    num_keep
        K, at most V.
    factor, offset
        ``[G, V]``: the gain of a token is multiplied by the one, then raised by the other.

    Returns
    -------
    Tensor
        ``[G, K]`` long, in the order chosen.
    """
    groups, _, size = rows.shape
    factor = rows.new_ones(groups, size) if factor is None else factor
    offset = rows.new_zeros(groups, size) if offset is None else offset
    if rows.device.type == "cpu":
        parts = zip(rows, factor, offset, strict=True)
        return torch.stack([_cover_changes(table, num_keep, times, plus) for table, times, plus in parts])
    return _cover_dense(rows, num_keep, factor, offset)


def _cover_dense(rows: Tensor, num_keep: int, factor: Tensor, offset: Tensor) -> Tensor:
    """All gains anew at every step: more to read, nothing to wait for."""
    groups, height, size = rows.shape
    covered = rows.new_zeros(groups, height, 1)
    chosen = rows.new_zeros(groups, size)
    order = torch.empty(groups, num_keep, dtype=torch.long, device=rows.device)
    room = torch.empty_like(rows)
    for step in range(num_keep):
        gain = torch.sub(rows, covered, out=room).relu_().sum(dim=1)
        best = torch.addcmul(chosen + offset, gain, factor).argmax(dim=1, keepdim=True)
        order[:, step : step + 1] = best
        chosen.scatter_(1, best, -torch.inf)
        covered = torch.maximum(covered, _columns(rows, best))
    return order


def _cover_changes(rows: Tensor, num_keep: int, factor: Tensor, offset: Tensor) -> Tensor:
    """
    The same for one group, touching only rows that the last choice covers better.

    These are about ``R / t`` at step t. How many is known on the CPU without waiting, and only there.
    """
    covered = rows.new_zeros(len(rows))
    # Differences add up over all steps: doubles, so that no more is lost than by summing anew in float32.
    gain = rows.relu().sum(dim=0, dtype=torch.double)
    chosen = torch.zeros_like(factor)
    order = torch.empty(num_keep, dtype=torch.long)
    for step in range(num_keep):
        # Rounded, because gains that are equal differ in the last digits of a double, by the way they came about.
        best = (gain.float() * factor + offset + chosen).argmax()
        order[step] = best
        chosen[best] = -torch.inf
        column = rows[:, best]
        better = (column > covered).nonzero()[:, 0]
        before, after = covered[better], column[better]
        lost = rows[better].clamp_(before[:, None], after[:, None])
        gain -= lost.sum(dim=0, dtype=torch.double) - before.sum(dtype=torch.double)
        covered[better] = after
    return order


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """``[G, 1, V]``: one row ``index [G, 1]`` of every table ``[G, R, V]``."""
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[2]))


def _columns(table: Tensor, index: Tensor) -> Tensor:
    """``[G, R, 1]``: one column ``index [G, 1]`` of every table ``[G, R, V]``."""
    return table.gather(2, index[:, None].expand(-1, table.shape[1], -1))
