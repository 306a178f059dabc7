"""Index arithmetic of reductions: groups, quotas, the remaining sequence and the way back, on arbitrary layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmmhooks.engines.grouping import (
    assign_quotas,
    find_groups,
    inverse_index,
    remaining_rows,
    same_shape,
    stack_left,
)
from lmmhooks.engines.sequences import (
    gather_deepstack,
    gather_last,
    gather_rotary,
    gather_states,
    put_back,
    renumbered,
)
from lmmhooks.layout import Layout, Segment, VisualSpan
from lmmhooks.methods.reduction.base import CropwiseMethod, ReductionMethod
from lmmhooks.vision import ImageTokens


class Cropwise(CropwiseMethod):
    id = "test-cropwise"


@st.composite
def layouts(draw):
    """Rows with padding on either side, text, and images of one to three crops, some with newline tokens."""
    batch = draw(st.integers(1, 3))
    rows, spans = [], []
    for sample in range(batch):
        row = [Segment.PADDING] * draw(st.integers(0, 3)) + [Segment.SYSTEM] * draw(st.integers(1, 3))
        for image in range(draw(st.integers(0, 2))):
            grids = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
            tokens = ImageTokens.raster(grids)
            if draw(st.booleans()):
                parts = torch.stack([tokens.crop, tokens.row, tokens.col])
                ends = [i for i in range(len(tokens)) if i + 1 == len(tokens) or tokens.row[i + 1] != tokens.row[i]]
                for end in reversed(ends):
                    parts = torch.cat([parts[:, : end + 1], torch.full((3, 1), -1), parts[:, end + 1 :]], dim=1)
                tokens = ImageTokens(*parts, tokens.grids)
            if draw(st.booleans()) and image:
                tokens = ImageTokens.unknown(len(tokens))
            positions = torch.arange(len(row), len(row) + len(tokens))
            spans.append(VisualSpan(sample, image, 0, "image", positions, tokens))
            row += [Segment.VISUAL] * len(tokens) + [Segment.INSTRUCTION] * draw(st.integers(0, 2))
        rows.append(row + [Segment.INSTRUCTION] * draw(st.integers(1, 3)))
    length = max(map(len, rows))
    segment = torch.tensor([row + [Segment.PADDING] * (length - len(row)) for row in rows], dtype=torch.int8)
    return Layout(segment, tuple(spans))


@st.composite
def reductions(draw):
    layout = draw(layouts())
    scope = draw(st.sampled_from(["crop", "image", "sample"]))
    newline = draw(st.sampled_from(["drop", "keep_per_row", "per_kept_row"] + ["rank"] * (scope != "crop")))
    keep = draw(st.one_of(st.integers(0, 12), st.floats(0.05, 1.0)))
    method = Cropwise(keep=keep, keep_per=draw(st.sampled_from(["image", "crop"])))
    groups = assign_quotas(find_groups(layout, scope, newline), keep, method.count, method.split, {})
    shuffled = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    chosen = [torch.randperm(len(group), generator=generator)[: group.quota] for group in groups]
    return layout, newline, groups, [index if shuffled else index.sort().values for index in chosen]


@settings(max_examples=150, deadline=None)
@given(reductions())
def test_what_remains_is_what_was_chosen_and_all_text(reduction):
    layout, newline, groups, chosen = reduction
    rows = remaining_rows(layout, layout.valid, groups, chosen, newline)
    for sample, row in enumerate(rows):
        assert len(row.unique()) == len(row)
        text = (layout.valid & ~layout.visual)[sample].nonzero().flatten()
        assert torch.equal(row[torch.isin(row, text)], text), "text stays, in order"
        for group, index in zip(groups, chosen, strict=True):
            if group.sample == sample:
                order = group.positions[index]
                assert torch.equal(row[torch.isin(row, group.positions)], order), "the method's own order"
        for span in layout.spans_of(sample):
            newlines = span.positions[(span.tokens.crop < 0) if span.tokens.grids else torch.zeros(len(span)).bool()]
            places = span.positions[~torch.isin(span.positions, newlines)]
            kept = int(torch.isin(newlines, row).sum())
            if newline == "keep_per_row" or (newline != "rank" and torch.isin(places, row).all()):
                assert kept == len(newlines)
            elif newline == "drop":
                assert kept == 0


@settings(max_examples=150, deadline=None)
@given(reductions())
def test_gathering_and_putting_back_are_inverse(reduction):
    layout, newline, groups, chosen = reduction
    index = stack_left(remaining_rows(layout, layout.valid, groups, chosen, newline))
    inverse = inverse_index(index, layout.length)
    # Columns there and back.
    assert torch.equal(gather_last(torch.cat([inverse, -torch.ones_like(inverse[:, :1])], 1), index)[index >= 0],
                       torch.arange(index.shape[1]).expand_as(index)[index >= 0])  # fmt: skip
    states = torch.randn(layout.batch, layout.length, 4, generator=torch.Generator().manual_seed(0))
    moved = gather_states(states, index)
    assert torch.equal(put_back(states, moved, inverse), states)
    changed = put_back(states, moved + 1, inverse)
    stayed = inverse >= 0
    assert torch.equal(changed[~stayed], states[~stayed])
    assert torch.equal(changed[stayed], states[stayed] + 1)
    # Padding is on the left, and the layout of what is left agrees with the index.
    padded = index < 0
    assert (padded.int().diff(dim=1) <= 0).all()
    gathered = layout.gather(index)
    assert torch.equal(gathered.valid, ~padded)
    assert torch.equal(gathered.visual, layout.visual.gather(1, index.clamp(min=0)) & ~padded)
    numbers = renumbered(index)
    for row in range(layout.batch):
        assert numbers[row, ~padded[row]].tolist() == list(range(int((~padded[row]).sum())))


@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from(["crop", "image", "sample"]), st.one_of(st.integers(0, 12), st.floats(0.05, 1.0)))
def test_quotas_add_up(layout, scope, keep):
    method = Cropwise(keep=keep)
    initial: dict = {}
    groups = assign_quotas(find_groups(layout, scope, "drop"), keep, method.count, method.split, initial)
    assert all(0 <= group.quota <= len(group) for group in groups)
    if isinstance(keep, float):
        assert all(group.quota >= 1 for group in groups), "a share never empties a group"
        return
    for sample in range(layout.batch):
        per_image = [
            len(span) if not span.tokens.grids else int((span.tokens.crop >= 0).sum())
            for span in layout.spans_of(sample)
        ]
        expected = sum(min(keep, number) for number in per_image)
        assert sum(group.quota for group in groups if group.sample == sample) == expected


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_groups_of_one_shape_are_batched_and_none_is_lost(layout):
    groups = find_groups(layout, "crop", "drop")
    batches = same_shape(groups)
    assert sorted(ordinal for batch in batches for ordinal in batch) == list(range(len(groups)))
    for batch in batches:
        first = groups[batch[0]]
        assert all(torch.equal(groups[i].row, first.row) and torch.equal(groups[i].col, first.col) for i in batch)


@pytest.mark.parametrize(
    ("keep", "sizes", "expected"),
    [
        (7, (4, 4, 4), [3, 2, 2]),
        (10, (2, 9, 9), [2, 4, 4]),
        (100, (2, 3), [2, 3]),
        (1, (5, 5), [1, 0]),
        (0, (5, 5), [0, 0]),
    ],
)
def test_an_image_splits_its_tokens_evenly_over_crops(keep, sizes, expected):
    assert ReductionMethod.split(Cropwise(keep=1), keep, sizes) == expected


def test_shares_forgive_binary_fractions():
    method = Cropwise(keep=1)
    assert [method.count(0.29, 100), method.count(0.1, 3), method.count(0.5, 7), method.count(0.7, 10)] == [29, 1, 3, 7]


@pytest.mark.parametrize("leading", [(), (3,)])
def test_rotary_angles_follow_the_index_whether_or_not_rows_share_them(leading):
    index = torch.tensor([[-1, 0, 3], [1, 2, 4]])
    for batch in (1, 2):
        angles = torch.randn(*leading, batch, 5, 6)
        moved = gather_rotary(angles, index)
        assert moved.shape == (*leading, 2, 3, 6)
        full = angles.expand(*leading, 2, 5, 6)
        for row in range(2):
            for column, position in enumerate(index[row].tolist()):
                if position >= 0:
                    assert torch.equal(moved[..., row, column, :], full[..., row, position, :])


def test_deepstack_features_follow_their_tokens_through_any_order():
    mask = torch.tensor([[False, True, True, False], [True, True, True, False]])
    features = [torch.arange(5.0)[:, None] + 10 * layer for layer in range(2)]
    index = torch.tensor([[-1, 2, 3], [2, 0, 3]])
    new_mask, moved = gather_deepstack(mask, features, index)
    assert new_mask.tolist() == [[False, True, False], [True, True, False]]
    # Row 0 kept its second visual token (1), row 1 its third (4) before its first (2).
    assert moved[0].flatten().tolist() == [1, 4, 2]
    assert moved[1].flatten().tolist() == [11, 14, 12]
