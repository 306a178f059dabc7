"""VL-Cache against explicit attention, one head, one row and one entry at a time."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.methods.reduction.caching import CacheEntries
from lmmhooks.methods.reduction.vl_cache import VLCache, layer_shares
from tests.engines.pressers import STEPS, TOLERANCE, generate, visual_of
from tests.reference.caching import prompt_attention, step_logits, vl_cache, vl_cache_sizes
from tests.zoo import build


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.4, "p": 0.1, "recent_ratio": 0.3, "min_keep": 0.05, "n_min": 1},
        {"alpha": 0.2, "p": 0.01, "recent_ratio": 0.0, "min_keep": 0.3, "n_min": 9},
    ],
    ids=["question", "last nine rows"],
)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_equals_the_naive_rendering_while_decoding(family, settings):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, VLCache(**settings)):
        answer, logits, lengths = generate(zoo, inputs)
    most = [0] * 4
    for row in range(2):
        one = zoo.row(inputs, row)
        visual = visual_of(one)
        seen = prompt_attention(zoo.model, one)
        sizes = vl_cache_sizes(visual, seen, settings["alpha"], settings["p"], settings["min_keep"], settings["n_min"])
        most = [max(pair) for pair in zip(most, sizes, strict=True)]
        press = vl_cache(visual, sizes, settings["recent_ratio"], settings["n_min"])
        expected = step_logits(zoo.model, one, press, answer[row])
        torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=0)
    assert lengths == [size + STEPS - 1 for size in most]


def test_the_question_alone_ranks():
    """What is written before and between images does not: its rows may attend as they like."""
    method = VLCache()
    weights = torch.rand(1, 2, 3, 7)
    all_rows = method.tally(weights, torch.ones(1, 3, dtype=torch.bool))
    two_rows = method.tally(weights, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(two_rows["received"], weights[:, :, 1:].sum(dim=2))
    assert two_rows["reaching"] < all_rows["reaching"]
    assert method.rows == "after_last_image+1"


def test_shares_average_to_the_budget_and_keep_their_bounds():
    density = torch.tensor([[0.2], [0.4], [0.1], [0.3]], dtype=torch.double)
    shares = layer_shares(density, 0.1, 0.01)
    assert shares.flatten().tolist() == pytest.approx([0.08, 0.16, 0.04, 0.12])
    assert float(shares.mean()) == pytest.approx(0.1)
    assert layer_shares(density, 0.1, 0.06).flatten().tolist() == pytest.approx([0.08, 0.16, 0.06, 0.12])
    assert layer_shares(density, 0.9, 0.01).flatten().tolist() == pytest.approx([0.72, 1.0, 0.36, 1.0])
    assert layer_shares(torch.zeros(2, 1, dtype=torch.double), 0.5, 0.01).flatten().tolist() == [0.01, 0.01]


def test_density_is_of_what_the_rows_of_a_layer_see():
    """A reducer left the second layer fewer entries; the last row of ten sees ten, the one before it nine."""

    def entries(layer: int, num: int) -> CacheEntries:
        empty, valid = torch.zeros(1, 1, num, 4), torch.ones(1, num, dtype=torch.bool)
        read = torch.arange(num)[None] >= num - 2
        tallies = {"received": torch.zeros(1, 1, num), "reaching": torch.tensor([19])}
        return CacheEntries(layer, empty, empty, valid, valid, read, tallies, (valid[0],))

    densities = (19 / 199, 19 / 19)
    shares = [0.5 * 2 * density / sum(densities) for density in densities]
    expected = [[math.ceil(shares[0] * 100)], [math.ceil(shares[1] * 10)]]
    assert VLCache(alpha=0.5).num_keep([entries(0, 100), entries(1, 10)]) == expected == [[9], [10]]


def test_layers_differ_and_together_hold_about_the_budget():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, images=3, text=20)
    with lmmhooks.wrap(zoo.model, VLCache(alpha=0.3, p=0.2)) as patch:
        _, _, lengths = generate(zoo, inputs)
        held = [layer.kv_bytes for layer in patch.stats.layers]
    length = inputs["input_ids"].shape[1]
    sizes = [num - (STEPS - 1) for num in lengths]
    assert len(set(sizes)) > 1
    # Every layer rounds up.
    assert 0.3 * 4 * length <= sum(sizes) <= 0.3 * 4 * length + 4
    assert held == [size * 2 * 2 * 16 * 4 for size in sizes]


def test_a_prompt_that_ends_in_its_image_ranks_by_its_last_row():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, text=0)
    settings = {"alpha": 0.4, "p": 0.1, "min_keep": 0.05, "n_min": 1}
    with lmmhooks.wrap(zoo.model, VLCache(**settings)):
        answer, logits, _ = generate(zoo, inputs)
    visual = visual_of(inputs)
    assert visual[-1]
    sizes = vl_cache_sizes(visual, prompt_attention(zoo.model, inputs), 0.4, 0.1, 0.05, 1)
    expected = step_logits(zoo.model, inputs, vl_cache(visual, sizes, 0.1, 1), answer[0])
    torch.testing.assert_close(logits[0], expected, atol=TOLERANCE, rtol=0)


def test_what_is_generated_does_not_decide_what_stays():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, VLCache(alpha=0.3)):
        first = [generate(zoo, inputs, max_new_tokens=steps, min_new_tokens=steps)[1][:, 1] for steps in (2, 5)]
    assert torch.equal(first[0], first[1])


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"min_keep": 1.0}])
def test_keeping_everything_is_bit_identical(settings):
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    _, plain, lengths = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, VLCache(**settings)):
        _, logits, kept = generate(zoo, inputs)
    assert torch.equal(logits, plain)
    assert kept == lengths


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0.0}, {"alpha": 1.5}, {"p": 0.0}, {"p": 1.0}, {"recent_ratio": 2}, {"min_keep": 0}, {"n_min": 0}],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("vl-cache", **settings)
