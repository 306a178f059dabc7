"""Attention as it is not: what replaces maps of the vision tower and of decoder layers in a counterfactual reading."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lmmhooks.methods.decoding.view import BranchAttention

__all__ = ["attend_otherwise", "counterfactual_map", "patch_weights", "random_numbers"]

MapEdit = Literal["random", "uniform", "reversed", "shuffle"]
RowEdit = Literal["reverse", "random", "uniform"]

#: Query rows whose weights are looked at together.
ROW_BLOCK = 256


def counterfactual_map(weights: Tensor, edit: MapEdit, seed: int) -> Tensor:
    """
    Maps of a vision layer with their information taken away.

    Parameters
    ----------
    weights
        float32 ``[crops, H, N, N]`` after the softmax.
    edit
        ``"random"``: numbers in [0, 2); ``"uniform"``: the mean; ``"reversed"``: the largest of its head minus each;
        ``"shuffle"``: all entries of a head permuted.
    seed
        Of random numbers and permutations, which differ between heads and are the same for all crops.

    Returns
    -------
    Tensor
        Like ``weights``.
    """
    _, heads, num, _ = weights.shape
    if edit == "uniform":
        return torch.full_like(weights, 1 / num)
    if edit == "reversed":
        return weights.amax(dim=(-2, -1), keepdim=True) - weights
    generator = torch.Generator().manual_seed(seed)
    if edit == "random":
        return (torch.rand(heads, num, num, generator=generator) * 2).to(weights).expand_as(weights)
    order = torch.stack([torch.randperm(num * num, generator=generator) for _ in range(heads)]).to(weights.device)
    return weights.flatten(2).gather(2, order.expand(len(weights), -1, -1)).view_as(weights)


def patch_weights(maps: Tensor, side: int) -> Tensor:
    """
    A weight per patch: the map of every head, resized as if it were an image, mean over heads.

    Parameters
    ----------
    maps
        ``[crops, H, N, N]``.
    side
        Rows and columns of the patch grid.

    Returns
    -------
    Tensor
        ``[crops, side * side]``.
    """
    resized = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return resized.mean(dim=1).flatten(1)


def random_numbers(seed: int, layer: int, heads: int, rows: Tensor, keys: Tensor) -> Tensor:
    """
    Numbers in [0, 1) that depend on where they are used and on nothing else: neither batch, padding nor cache.

    Parameters
    ----------
    seed, layer
        Two of the places.
    heads
        H, counted from 0.
    rows, keys
        Long ``[B, R]`` and ``[B, N]``.

    Returns
    -------
    Tensor
        float32 ``[B, H, R, N]``, multiples of 2^-24.
    """

    def mixed(value: Tensor) -> Tensor:
        # Multiplications that wrap around, and shifts of which only the bits count that were shifted.
        value = value * 6364136223846793005 + 1442695040888963407
        return value ^ ((value >> 31) & 0x1FFFFFFFF)

    head = torch.arange(heads, device=rows.device)[:, None, None]
    number = mixed(mixed(torch.full_like(head, seed)) + layer)
    number = mixed(mixed(mixed(number + head) + rows[:, None, :, None]) + keys[:, None, None, :])
    return ((mixed(number) >> 40) & 0xFFFFFF).float() / 2**24


def attend_otherwise(call: BranchAttention, edit: RowEdit, renormalize: bool, seed: int) -> Tensor:
    """
    Causal attention with counterfactual weights; nothing of the size of all pairs is ever held.

    Weights ``P`` of a row that sees n keys, of a prompt of N tokens (N >= n for rows of the prompt, N = n behind it):

    - ``"uniform"``: 1 / N, so the output is a prefix sum of values;
    - ``"reverse"``: max P - P, so it is the prefix sum times the maximum, less the ordinary output;
    - ``"random"``: numbers in [0, 1) over the sum of N of them.

    Parameters
    ----------
    call
        Of a decoder layer.
    edit
        See above.
    renormalize
        Divide by the sum of the n weights; a row whose sum is zero keeps ``P``.
    seed
        Of the random numbers.

    Returns
    -------
    Tensor
        ``[B, H, Nq, d]``.
    """
    batch, heads, num_queries, _ = call.query.shape
    valid = call.layout.valid
    counted = valid.long().cumsum(dim=1)
    seen = counted[:, -num_queries:].clamp(min=1)
    extent = torch.maximum(seen, counted[:, call.prompt_length - 1 : call.prompt_length])
    if edit == "random":
        return _random_rows(call, renormalize, seed, counted - 1, extent)
    values = call.value.float().masked_fill(~valid[:, None, :, None], 0)
    total = values.cumsum(dim=2)[:, :, -num_queries:].repeat_interleave(heads // values.shape[1], dim=1)
    if edit == "uniform":
        return (total / (seen if renormalize else extent)[:, None, :, None]).to(call.value.dtype)
    plain = call.plain()
    rows = torch.arange(num_queries, device=call.query.device).expand(batch, -1)
    largest = torch.cat([call.weights_of(part).amax(dim=-1, keepdim=True) for part in rows.split(ROW_BLOCK, dim=1)], 2)
    out = largest * total - plain.float()
    if renormalize:
        mass = largest * seen[:, None, :, None] - 1
        # Equal weights leave nothing of a row but rounding.
        out = torch.where(mass > 1e-6, out / mass, plain.float())
    return out.to(call.value.dtype)


def _random_rows(call: BranchAttention, renormalize: bool, seed: int, number: Tensor, extent: Tensor) -> Tensor:
    _, heads, num_queries, _ = call.query.shape
    valid = call.layout.valid[:, None, None, :]
    keys = number[:, None, None, :]
    blocks = []
    for start in range(0, num_queries, ROW_BLOCK):
        part = slice(start, min(start + ROW_BLOCK, num_queries))
        rows = number[:, -num_queries:][:, part]
        drawn = random_numbers(seed, call.layer, heads, rows, number).masked_fill(~valid, 0)
        shown = valid & (keys <= rows[:, None, :, None])
        kept = drawn.masked_fill(~shown, 0)
        whole = kept if renormalize else drawn.masked_fill(keys >= extent[:, None, part, None], 0)
        # A row of padding sees nothing and sums to nothing.
        weights = kept / whole.sum(dim=-1, keepdim=True).clamp(min=math.ldexp(1, -24))
        grouped = weights.unflatten(1, (call.value.shape[1], -1)).flatten(2, 3).to(call.value.dtype)
        blocks.append((grouped @ call.value).view(*weights.shape[:3], -1))
    return torch.cat(blocks, dim=2)
