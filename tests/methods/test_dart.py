"""DART against keys of an unpatched model and lists of numbers."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.methods.reduction.dart import Dart, least_similar
from tests.methods.cuts import KWARGS, SEVERAL, equals_rendering, kept, same_bits
from tests.reference.decoder_cuts import dart
from tests.zoo import build


def rendering(num_keep, pivots, text_pivots, order=None, layer=2):
    def cuts(zoo, inputs, row, images):
        # Nothing was cut before: the keys are those of the plain model.
        with torch.no_grad():
            cache = zoo.model(**zoo.row(inputs, row), use_cache=True).past_key_values
        keys = cache.layers[layer - 1].keys[0]
        visual = [n for image in images for n in image]
        norm = zoo.model.model.language_model.norm
        total = num_keep if isinstance(num_keep, int) else int(num_keep * len(visual) + 1e-9)
        total = total * len(images) if isinstance(num_keep, int) else total
        return {layer: dart(norm, keys, visual, total, pivots, text_pivots, order)}

    return cuts


@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering_at_prefill_and_decode(family):
    equals_rendering(family, Dart(keep=0.6, pivots=2, text_pivots=2), rendering(0.6, 2, 2))


@pytest.mark.parametrize("order", [(3, 1, 0, 2), (0, 1, 2, 3)])
def test_an_explicit_order_of_pivots(order):
    equals_rendering("llava", Dart(keep=8, pivots=2, text_pivots=2, order=order), rendering(8, 2, 2, order))


@pytest.mark.parametrize("settings", [{"pivots": 1, "text_pivots": 0}, {"pivots": 4, "text_pivots": 4}])
def test_other_numbers_of_pivots(settings):
    method = Dart(keep=0.5, layer=1, **settings)
    equals_rendering("llava", method, rendering(0.5, settings["pivots"], settings["text_pivots"], layer=1))


@pytest.mark.parametrize(
    ("keep", "expected"), [(8, 4 + 8 * 1), (9, 4 + 8 * 1), (4, 4), (1, 4), (15, 4 + 8 * 1), (16, 16)]
)
def test_visual_pivots_come_on_top_of_what_is_divided(keep, expected):
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    sets = kept(zoo, inputs, Dart(keep=keep))
    assert len(sets[0]) - len(sets[3]) == 16 - expected


def test_pivots_depend_on_how_positions_are_counted():
    """Rotary embedding keeps the L2 norm of a key, not the L1 norm: why prompts are numbered without padding here."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        moved = [
            zoo.model(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None] + offset, use_cache=True)
            .past_key_values.layers[1].keys
            for offset in (0, 7)
        ]  # fmt: skip
    torch.testing.assert_close(moved[0].norm(dim=-1), moved[1].norm(dim=-1), atol=1e-4, rtol=0)
    assert (moved[0] - moved[1]).abs().sum(dim=-1).max() > 0.1


def test_published_counts():
    """132 tokens for a budget of 128, as released."""
    pivots, shares = Dart(keep=128)._shares(576, 128)
    assert pivots + sum(shares) == 132
    assert Dart().count(2 / 9, 576) == 128


def test_a_prompt_with_little_text_has_fewer_pivots():
    zoo = build("llava")
    short, long = zoo.inputs(batch=1, text=2), zoo.inputs(batch=2, text=[2, 9])
    alone = kept(zoo, short, Dart(keep=8))
    # Two text pivots are missing, and so are their tokens.
    assert len(alone[0]) - len(alone[2]) == 16 - (4 + 6)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Dart(keep=8)) as patch:
        zoo.model(**long)
        assert patch.stats.layers[2].visual_kept == (10, 12)


def test_pivots_choose_in_turn_and_ties_go_to_the_lower_index():
    pivots = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    states = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]])
    free = torch.tensor([[True, True, True, True]])
    real = torch.tensor([[True, True]])
    # The first takes its opposite; of 0, 1, 0 to the second, token 1 is least similar, then token 0 (tie with 2).
    assert least_similar(pivots, real, states, free, [1, 1]).nonzero()[:, 1].tolist() == [1, 3]
    assert least_similar(pivots, real, states, free, [2, 1]).nonzero()[:, 1].tolist() == [0, 1, 3]
    assert least_similar(pivots, torch.tensor([[False, True]]), states, free, [1, 1]).nonzero()[:, 1].tolist() == [1]


@pytest.mark.parametrize("budget", [9, 12, 0.6])
def test_a_budget_counts_the_pivots_in(budget):
    zoo = build("llava")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Dart(budget=budget)) as patch:
        zoo.model(**zoo.inputs(batch=1))
        stats = patch.stats
    wanted = budget if isinstance(budget, int) else budget * 16
    # One cut before layer 2 of 4: the nearest whole number is within half a token times half the layers.
    assert abs(stats.average_visual - wanted) <= 0.25 + 1e-9


def test_a_cut_before_the_decoder_leaves_the_final_norm_alone():
    """The norm is applied on the way, where calling the module would end the reduction."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "fastervlm(keep=12)", "dart(keep=4)") as patch:
        assert zoo.model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
        assert [layer.visual_kept for layer in patch.stats.layers] == [(12, 12)] * 2 + [(4, 4)] * 2


def test_keeping_everything_changes_nothing():
    same_bits("llava", Dart(keep=1.0))
    same_bits("llava", Dart(keep=16))
    same_bits("llava", Dart(keep=1, layer=4))


@pytest.mark.parametrize("beside", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)"])
def test_it_composes(beside):
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    logits = []
    for methods in (["dart", beside], ["dart"]):
        with lmmhooks.wrap(zoo.model, *methods):
            logits.append(torch.stack(zoo.model.generate(**inputs, **KWARGS).logits))
    assert torch.isfinite(logits[0]).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"keep": None}, "keep"),
        ({"layer": 0}, "layer"),
        ({"pivots": 0}, "pivots"),
        ({"text_pivots": -1}, "text_pivots"),
        ({"order": (0, 1, 2)}, "order"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("dart", **settings)
