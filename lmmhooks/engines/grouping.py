"""
Index arithmetic of a reduction: what is reduced together, how many of it stay, and the sequence that remains.

Everything here is on the CPU, where a layout knows its visual tokens; nothing touches states or hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from lmmhooks.layout import Layout, VisualSpan
from lmmhooks.methods.reduction.base import Newline, Scope
from lmmhooks.vision import Tiling

__all__ = [
    "Group",
    "Key",
    "assign_quotas",
    "find_groups",
    "inverse_index",
    "remaining_rows",
    "same_shape",
    "stack_left",
]

Key = tuple[int, int, int]
"""Row of the batch, image and crop; -1 for what a group spans."""


@dataclass(frozen=True, eq=False)
class Group:
    """
    Visual tokens that are reduced together.

    Attributes
    ----------
    key
        Which they are.
    positions
        Long ``[V]``: where they stand in the sequence, ascending.
    crop, row, col
        Long ``[V]``: their crops and cells there, -1 where unknown.
    grid
        Full token grid of the crop; None when unknown or when the group spans several crops.
    images
        Tokens of every image in the group.
    tiling
        How the crops of a group that is one image belong together; None otherwise.
    quota
        How many stay.
    """

    key: Key
    positions: Tensor
    crop: Tensor
    row: Tensor
    col: Tensor
    grid: tuple[int, int] | None
    images: tuple[int, ...]
    tiling: Tiling | None = None
    quota: int = 0

    @property
    def sample(self) -> int:
        """Row of the batch."""
        return self.key[0]

    def __len__(self) -> int:
        return len(self.positions)


def _placeless(span: VisualSpan) -> Tensor:
    """Tokens that show no place in an image whose geometry is known: newlines, separators, CLS."""
    if not span.tokens.grids:
        return torch.zeros(len(span), dtype=torch.bool)
    return span.tokens.crop < 0


def find_groups(layout: Layout, scope: Scope, newline: Newline) -> list[Group]:
    """
    Groups of a layout in sequence order, empty ones left out.

    Newline tokens belong to a group only where they are ranked with the others.
    """
    groups: list[Group] = []
    for span in layout.spans:
        candidate = torch.ones(len(span), dtype=torch.bool) if newline == "rank" else ~_placeless(span)
        tokens, grids = span.tokens, span.tokens.grids
        parts: list[tuple[int, Tensor]] = [(-1, candidate)]
        if scope == "crop" and grids:
            parts = [(crop, candidate & (tokens.crop == crop)) for crop in range(len(grids))]
        for crop, members in parts:
            number = int(members.sum())
            grid = grids[crop] if crop >= 0 else (grids[0] if len(grids) == 1 else None)
            if number:
                key = (span.sample, span.image, crop)
                place = span.positions[members], tokens.crop[members], tokens.row[members], tokens.col[members]
                groups.append(Group(key, *place, grid, (number,), None if crop >= 0 else tokens.tiling))
    if scope == "sample":
        return [_joined(list(members)) for _, members in groupby(groups, key=lambda group: group.sample)]
    return groups


def _joined(groups: Sequence[Group]) -> Group:
    names = ("positions", "crop", "row", "col")
    positions, crop, row, col = (torch.cat([getattr(g, name) for g in groups]) for name in names)
    images = tuple(number for group in groups for number in group.images)
    return Group((groups[0].sample, -1, -1), positions, crop, row, col, None, images)


def assign_quotas(
    groups: Sequence[Group],
    keep: int | float | None,
    count: Callable[[float, int], int],
    split: Callable[[int, Sequence[int]], list[int]],
    initial: dict[Key, tuple[int, ...]],
    targets: Mapping[tuple[int, int], int] | None = None,
) -> list[Group]:
    """
    Groups with their quotas.

    Parameters
    ----------
    groups
        Of one layout.
    keep
        As in `Cut.keep`.
    count, split
        The method's rounding of shares, and its split of an image's tokens over crops.
    initial
        `Group.images` at the method's first cut, by group; filled in here when that cut is this one.
    targets
        Tokens left of every image, by row of the batch and image; takes the place of ``keep``.
    """
    out: list[Group] = []
    for _, members in groupby(groups, key=lambda group: group.key[:2]):
        image = list(members)
        for group in image:
            initial.setdefault(group.key, group.images)
        if targets is not None:
            sample, ordinal, _ = image[0].key
            left = sum(n for key, n in targets.items() if key[0] == sample and ordinal in (key[1], -1))
            quotas = split(left, [len(group) for group in image])
        elif keep is None:
            quotas = [len(group) for group in image]
        elif isinstance(keep, float):
            quotas = [min(len(group), count(keep, sum(initial[group.key]))) for group in image]
        elif image[0].key[2] >= 0:
            quotas = split(keep, [len(group) for group in image])
        else:
            quotas = [min(len(group), sum(min(keep, n) for n in initial[group.key])) for group in image]
        out += [replace(group, quota=quota) for group, quota in zip(image, quotas, strict=True)]
    return out


def same_shape(groups: Iterable[Group]) -> list[list[int]]:
    """Ordinals of groups that one call can reduce: equal length, quota and cells."""
    found: dict[tuple[object, ...], list[int]] = {}
    for ordinal, group in enumerate(groups):
        # Crops of images count from their own first; groups of one crop are alike whichever it is.
        crop = group.crop if group.key[2] < 0 else group.crop[:0]
        cells = (place.numpy().tobytes() for place in (crop, group.row, group.col))
        shape = (len(group), group.quota, group.grid, group.tiling, *cells)
        found.setdefault(shape, []).append(ordinal)
    return list(found.values())


def remaining_rows(
    layout: Layout, valid: Tensor | None, groups: Sequence[Group], chosen: Sequence[Tensor], newline: Newline
) -> list[Tensor]:
    """
    Positions that stay in every row of the batch, in the order of the new sequence.

    Parameters
    ----------
    layout
        Of the sequence as it is.
    valid
        Bool ``[B, N]``, CPU: no padding; None when nothing is padded. Padding never stays.
    groups
        Of this layout.
    chosen
        Per group, local indices that stay, long ``[K]``, in the order the decoder shall see them. Groups may interleave
        (tiles of a mosaic row by row): a group's order is laid over the places its own tokens take.
    newline
        What becomes of tokens that belong to no group.
    """
    staying = torch.ones(layout.batch, layout.length, dtype=torch.bool) if valid is None else valid.clone()
    for group, index in zip(groups, chosen, strict=True):
        staying[group.sample, group.positions] = False
        staying[group.sample, group.positions[index]] = True
    if newline != "rank":
        for span in layout.spans:
            placeless = _placeless(span)
            if placeless.any():
                left = staying[span.sample, span.positions]
                staying[span.sample, span.positions] = _with_newlines(span, placeless, left, newline)
    rows = [row.nonzero().flatten() for row in staying]
    for group, index in zip(groups, chosen, strict=True):
        order = group.positions[index]
        if (order[1:] < order[:-1]).any():
            row = rows[group.sample]
            row[torch.isin(row, order)] = order
    return rows


def _with_newlines(span: VisualSpan, placeless: Tensor, staying: Tensor, newline: Newline) -> Tensor:
    """Which tokens of a span stay, newlines decided by policy."""
    if staying[~placeless].all() or newline == "keep_per_row":
        # An image that lost nothing keeps its newlines too: keeping everything must change nothing.
        return staying | placeless
    if newline == "drop":
        return staying & ~placeless
    rows, kept, out = span.tokens.row.tolist(), staying.tolist(), staying.clone()
    for place in placeless.nonzero().flatten().tolist():
        start = place
        # The row in front of a newline: tokens of one row number, whatever tiles it runs through.
        while start > 0 and rows[start - 1] >= 0 and rows[start - 1] == rows[place - 1]:
            start -= 1
        out[place] = start == place or any(kept[start:place])
    return out


def stack_left(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different length as one long ``[B, N2]``, shorter ones padded on the left with -1."""
    length = max(len(row) for row in rows)
    index = torch.full((len(rows), length), -1)
    for sample, row in enumerate(rows):
        index[sample, length - len(row) :] = row
    return index


def inverse_index(index: Tensor, length: int) -> Tensor:
    """
    Where every old position went.

    Parameters
    ----------
    index
        Long ``[B, N2]``: old position of every new column, -1 for padding.
    length
        Old length N.

    Returns
    -------
    Tensor
        Long ``[B, N]``: the new column, -1 for positions that left.
    """
    inverse = torch.full((index.shape[0], length + 1), -1, device=index.device)
    columns = torch.arange(index.shape[1], device=index.device).expand_as(index)
    # Padding writes into a column of its own that is cut off.
    inverse.scatter_(1, torch.where(index < 0, length, index), columns)
    return inverse[:, :length]
