"""HoloV against loops over chunks."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.methods.reduction.holov import allocate, choose_by_chunk, chunk_scores, flat_chunks, grid_chunks
from tests.methods.choosing import FAMILIES, compare, plain, prompt_state
from tests.reference import diversity
from tests.zoo import build


def runs(size, number):
    """Consecutive chunks, the first ones longer."""
    number = min(number, size)
    sizes = [size // number + (i < size % number) for i in range(number)]
    return [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(number)]


def attention_of(group):
    return next(value for name, value in group.probes.items()).tolist()


@pytest.mark.parametrize("chunks", [1, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, chunks):
    def naive(group):
        chosen = diversity.holov(group.states, attention_of(group), runs(len(group.numbers), chunks), 3)
        return plain(chosen, ascending=family.startswith("qwen"))

    compare(family, lmmhooks.method("holov", keep=3, chunks=chunks), naive, by_crop=False)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
def test_chunks_may_be_rectangles_of_a_crop(family):
    def naive(group):
        rows, cols = sorted(set(group.cell_rows)), sorted(set(group.cell_cols))
        cells = [(rows.index(r), cols.index(c)) for r, c in zip(group.cell_rows, group.cell_cols, strict=True)]
        half = [[], [], [], []]
        for i, (r, c) in enumerate(cells):
            half[2 * (2 * r // len(rows)) + 2 * c // len(cols)].append(i)
        chosen = diversity.holov(group.states, attention_of(group), [c for c in half if c], 3)
        return plain(chosen)

    # Four chunks over grids from 2 x 4 to 4 x 4 are 2 x 2 halves.
    method = lmmhooks.method("holov", keep=3, chunks=4, chunk="grid", keep_per="crop", order="raster")
    compare(family, method, naive, by_crop=True, images=(1, 1))


@pytest.mark.parametrize(("size", "number"), [(576, 16), (20, 3), (7, 7), (5, 1), (600, 17)])
def test_shares_add_up(size, number):
    generator = torch.Generator().manual_seed(size)
    attention = torch.rand(3, size, generator=generator).softmax(dim=1)
    chunk = flat_chunks(size, number)
    assert [part.tolist() for part in chunk.argsort(stable=True).split(chunk.bincount().tolist())] == runs(size, number)
    scores = chunk_scores(torch.randn(3, size, 8, generator=generator), attention, chunk, 0.09)
    for num_keep in {1, size // 2, size - 1}:
        share = allocate(scores, num_keep)
        assert share.sum(dim=1).tolist() == [num_keep] * 3
        index = choose_by_chunk(attention, chunk, share, num_keep)
        assert all(len(set(row.tolist())) == num_keep for row in index)


def test_alike_chunks_get_alike_shares():
    states, attention = torch.randn(1, 1, 8).expand(1, 24, 8), torch.full((1, 24), 1 / 24)
    scores = chunk_scores(states, attention, flat_chunks(24, 4), 0.09)
    assert allocate(scores, 8).tolist() == [[2, 2, 2, 2]]


def test_one_chunk_is_the_most_attended_tokens():
    attention = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    index = choose_by_chunk(attention, flat_chunks(30, 1), torch.tensor([[9], [9]]), 9)
    assert torch.equal(index, attention.argsort(dim=1, descending=True)[:, :9])


def test_what_a_chunk_cannot_use_goes_to_the_most_attended_left():
    attention = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.4, 0.3]])
    index = choose_by_chunk(attention, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([[4, 0, 0]]), 4)
    assert index.tolist() == [[0, 1, 4, 5]]


def test_the_number_of_chunks_follows_the_release():
    def number(family, keep):
        state = []
        original = flat_chunks

        def note(size, count):
            state.append((size, count))
            return original(size, count)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lmmhooks.methods.reduction.holov.flat_chunks", note)
            prompt_state(build(family), build(family).inputs(batch=1), f"holov(keep={keep})")
        return state

    assert number("llava", 4) == [(16, 16)]
    assert number("qwen2_vl", 4) == [(15, int(1024 / 576 * 15 / 4))]
    assert int(1024 / 576 * 576 / 64) == 16


def test_grids_cover_every_cell():
    assert grid_chunks(4, 6, 4).view(4, 6).tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2


def test_settings_out_of_range_are_refused_by_name():
    for settings in ({"chunks": 0}, {"chunk": "2d"}, {"diversity": -0.1}, {"order": "chunk"}):
        with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
            lmmhooks.method("holov", keep=4, **settings)
