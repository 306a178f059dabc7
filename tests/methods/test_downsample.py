"""Downsampling against towers that are handed the small image by the test itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.downsample import Downsample, best_grid
from lmmhooks.smaller import centres, nearest
from tests.zoo import FAMILIES, build


def run(zoo, inputs, method):
    """Kept spans, the stage before the decoder, and its states."""
    states = []
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        hook = (
            resolve(zoo.model)
            .layers[0]
            .register_forward_pre_hook(
                lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        zoo.model(**inputs)
        hook.remove()
        return find_runtime(zoo.model).last.stages[0].layout, states[0]


def test_a_square_crop_is_seen_by_the_tower_at_the_smaller_size():
    zoo = build("llava")
    family = resolve(zoo.model)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    layout, states = run(zoo, inputs, "downsample(keep=4)")
    pixels = torch.nn.functional.interpolate(inputs["pixel_values"], size=(8, 8), mode="bicubic", antialias=True)
    with torch.no_grad():
        seen = family.vision(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        expected = family.project(seen.hidden_states[-2][:, 1:])
    assert [len(span) for span in layout.spans] == [4, 4, 4]
    for image, span in enumerate(layout.spans):
        torch.testing.assert_close(states[span.sample, span.positions], expected[image], atol=1e-5, rtol=0)


def test_an_image_of_any_size_is_seen_as_if_it_had_been_small():
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        zoo = build(name)
        family = resolve(zoo.model)
        inputs = zoo.inputs(batch=1)
        layout, states = run(zoo, inputs, "downsample(keep=8)")
        (span,) = layout.spans
        assert len(span) == 8  # 3 x 5 tokens become 2 x 4
        small = family.shrink({"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}, [(2, 4)])
        with torch.no_grad():
            expected = family.vision(**small).pooler_output
        torch.testing.assert_close(states[0, span.positions], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_remains_is_a_lattice_in_every_crop(name):
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    layout, states = run(zoo, inputs, "downsample(keep=0.5)")
    assert torch.isfinite(states).all()
    method = Downsample(keep=0.5)
    for span in layout.spans:
        for crop, (rows, cols) in enumerate(span.tokens.grids):
            own = span.tokens.crop == crop
            small = method.grid(rows, cols)
            cells = set(zip(span.tokens.row[own].tolist(), span.tokens.col[own].tolist(), strict=True))
            lattice = {(r, c) for r in centres(rows, small[0]).tolist() for c in centres(cols, small[1]).tolist()}
            assert cells <= lattice
            if name not in ("llava_next", "llava_onevision"):  # which leave out what lies in the padding
                assert cells == lattice


def test_everything_kept_changes_nothing():
    zoo = build("llava")
    inputs = zoo.inputs()
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, "downsample(keep=1.0)"):
            assert torch.equal(zoo.model(**inputs).logits, plain)
        with lmmhooks.wrap(zoo.model, "downsample(keep=4)"):
            assert not torch.equal(zoo.model(**inputs).logits, plain)
        assert torch.equal(zoo.model(**inputs).logits, plain)


def test_a_budget_is_a_share_of_every_crop():
    zoo = build("llava")
    layout, _ = run(zoo, zoo.inputs(), "downsample(budget=0.25)")
    assert [len(span) for span in layout.spans] == [4]
    with pytest.raises(lmmhooks.MethodError, match="budget_unit='flops' is not allowed"):
        Downsample(budget=0.5, budget_unit="flops")


def test_counts_that_tiles_would_have_to_share_are_refused():
    model = build("llava_next").model
    with pytest.raises(lmmhooks.MethodError, match="cannot be shared out over the tiles"):
        lmmhooks.wrap(model, "downsample(keep=16)")
    lmmhooks.wrap(model, "downsample(keep=4, keep_per='crop')").remove()


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_the_small_grid_is_within_budget_and_stands_for_itself(rows, cols, data):
    num_keep = data.draw(st.integers(1, rows * cols))
    small = best_grid(rows, cols, num_keep)
    assert 1 <= small[0] <= rows
    assert 1 <= small[1] <= cols
    assert small[0] * small[1] <= num_keep
    if num_keep == rows * cols:
        assert small == (rows, cols)
    grid = nearest((rows, cols), small).view(rows, cols)
    at = grid[centres(rows, small[0])][:, centres(cols, small[1])]
    assert torch.equal(at.flatten(), torch.arange(small[0] * small[1]))


def test_published_resolutions_come_out_square():
    assert best_grid(24, 24, 144) == (12, 12)
    assert best_grid(24, 24, 64) == (8, 8)
    assert best_grid(24, 24, 192) == (12, 16)
    assert best_grid(8, 8, 3) == (1, 2)
