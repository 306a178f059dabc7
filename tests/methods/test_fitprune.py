"""FitPrune against full attention matrices; its recipes against the figures printed with them."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.cost import DecoderShape, literature_macs
from lmmhooks.engines import editing
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.fitprune import FitPrune
from lmmhooks.methods.reduction.recipes import PUBLISHED, fit_recipe, kept_curve, left_after, longest_prefix
from tests.methods.cuts import KWARGS, SEVERAL, equals_rendering, kept, same_bits
from tests.reference.decoder_cuts import fitprune
from tests.zoo import build

RECIPE = {0.5: [0.25, 0.0, 0.5, 0.0]}


@pytest.mark.parametrize("block", [512, 4])
@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, block, monkeypatch):
    # Rows of long prompts are read in blocks.
    monkeypatch.setattr(editing, "ROW_BLOCK", block)

    def cuts(zoo, inputs, row, images):
        visual = [n for image in images for n in image]
        first = int(0.25 * len(visual))
        return fitprune(visual, {0: first, 2: int(0.75 * len(visual)) - first})

    equals_rendering(family, FitPrune(recipe=RECIPE, reduction=0.5), cuts)


@pytest.mark.parametrize("family", SEVERAL)
def test_neighbouring_layers_may_delete(family):
    def cuts(zoo, inputs, row, images):
        visual = [n for image in images for n in image]
        sums = [int(share * len(visual)) for share in (0.25, 0.5, 0.75)]
        return fitprune(visual, {0: sums[0], 1: sums[1] - sums[0], 2: sums[2] - sums[1]})

    equals_rendering(family, FitPrune(recipe={0.5: [0.25, 0.25, 0.25, 0.0]}, reduction=0.5), cuts)


def test_published_recipes_add_up():
    """Average numbers of tokens that enter and leave a layer, as printed (but for 40 %: 362.47 is printed as 363)."""
    printed = {
        10: (541, 539), 20: (493, 488), 30: (424, 415), 40: (362, 352), 50: (302, 289),
        60: (245, 231), 70: (188, 173), 80: (131, 115), 90: (73, 56),
    }  # fmt: skip
    for reduction, deleted in PUBLISHED["llava-1.5-7b"]:
        curve = kept_curve(PUBLISHED["llava-1.5-7b"], reduction, 32)
        left = [round(share * 576) for share in curve]
        entering = [576, *left[:-1]]
        assert (int(sum(entering) / 32 + 0.5), int(sum(left) / 32 + 0.5)) == printed[round(100 * reduction)]
        assert len(deleted) == 32
        assert sum(deleted) <= 1


def test_curves_fall_with_depth_and_with_the_reduction():
    for num_layers in (4, 28, 32, 40):
        before = [1.0] * num_layers
        for percent in range(101):
            curve = kept_curve(PUBLISHED["llava-1.5-7b"], percent / 100, num_layers)
            assert curve == sorted(curve, reverse=True)
            assert all(now <= earlier + 1e-12 for now, earlier in zip(curve, before, strict=True))
            before = curve
        assert kept_curve(PUBLISHED["llava-1.5-7b"], 0.0, num_layers) == [1.0] * num_layers


def test_a_cut_follows_every_layer_that_deletes():
    method = FitPrune(reduction=0.9)
    family = type("Shape", (), {"num_layers": 32})()
    cuts = method.cuts(family)
    deleted = [262, 153, 80, 19, 13, 1, 2, *[0] * 8, 1, 1, 2, 1, 2, 0, 1, *[0] * 5, 1]
    assert [cut.layer for cut in cuts] == [layer + 1 for layer, number in enumerate(deleted) if number]
    left, expected = 576, []
    for number in deleted:
        left -= number
        expected += [left] if number else []
    assert [method.count(cut.keep, 576) for cut in cuts] == expected


def test_cache_lengths_and_nested_sets():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    method = FitPrune(recipe=RECIPE, reduction=0.5)
    sets = kept(zoo, inputs, method)
    assert [len(sets[0]) - len(found) for found in sets] == [0, 4, 4, 12]
    assert sets[3] < sets[1] < sets[0]
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(**inputs, **KWARGS)
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [len(found) + 2 for found in sets]


def test_no_reduction_changes_nothing():
    same_bits("llava", FitPrune(reduction=0.0))
    same_bits("llava", FitPrune(recipe={0.5: [0.0] * 4}, reduction=0.5))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_budget_is_met_by_a_recipe_between_the_published_ones(family):
    zoo = build(family)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, FitPrune(budget=0.6)) as patch:
        zoo.model(**zoo.inputs(batch=1))
        stats = patch.stats
    whole = stats.layers[0].visual_in[0]
    # Three cuts of whole tokens.
    assert 0.6 * whole - 3 / 4 <= stats.average_visual <= 0.6 * whole


# -- fitting ----------------------------------------------------------------------------------------------------------

SHAPE = DecoderShape(layers=4, width=8, kv_width=8, ffn_width=16, vocabulary=10)


def test_the_longest_prefix_stops_one_token_early():
    scores = torch.tensor([4.0, 1.0, 2.0, 3.0])
    # Without 1 and 2 seven are left, without 3 as well four: at least five allow two tokens, of which one goes.
    assert longest_prefix(scores, 5.0).tolist() == [False, True, False, False]
    assert longest_prefix(scores, 4.0).tolist() == [False, True, True, False]
    assert not longest_prefix(scores, 10.0).any()
    assert not longest_prefix(scores, 20.0).any()


def naive_left_after(own, cross, alpha, budget):
    alive, deleted, spent = list(range(len(own[0]))), [], 0
    for layer in range(len(own)):
        n = len(alive)
        spent += 4 * n * 64 + 2 * n * n * 8 + 3 * n * 8 * 16
        gone = set(alive)
        for side in (own[layer].tolist(), cross[layer].tolist()):
            order = sorted(alive, key=lambda j, side=side: (side[j], j))
            fits = [k for k in range(1, n + 1) if sum(side[j] for j in order[k:]) >= (1 - alpha) * sum(side)]
            gone &= set(order[: max(len(fits) - 1, 0)])
        alive = [j for j in alive if j not in gone]
        deleted.append(len(gone))
        m = len(alive)
        if spent + (len(own) - layer - 1) * (4 * m * 64 + 2 * m * m * 8 + 3 * m * 8 * 16) <= budget:
            return deleted + [0] * (len(own) - layer - 1), True
    return deleted, False


def statistics(seed, num_layers=4, num_tokens=12):
    generator = torch.Generator().manual_seed(seed)
    # Doubles: the naive sums and the cumulative ones must agree on which side of a threshold they lie.
    draw = lambda: list(torch.rand(num_layers, num_tokens, generator=generator, dtype=torch.float64) ** 3)  # noqa: E731
    return draw(), draw()


@pytest.mark.parametrize("alpha", [0.1, 0.37, 0.8])
def test_deletions_of_a_sample_equal_the_naive_rendering(alpha):
    for seed in range(4):
        own, cross = statistics(seed)
        for share in (0.0, 0.7):
            budget = share * literature_macs(SHAPE, [12] * 4)
            assert left_after(own, cross, alpha, SHAPE, budget) == naive_left_after(own, cross, alpha, budget)


def test_a_fitted_recipe_meets_its_reduction():
    samples = [statistics(seed) for seed in range(3)]
    full = literature_macs(SHAPE, [12] * 4)
    for reduction in (0.2, 0.5):
        recipe = fit_recipe(samples[:1], reduction, SHAPE)
        deleted = [round(12 * share) for share in recipe]
        left, spent = 12, 0
        for number in deleted:
            spent += literature_macs(SHAPE, [left])
            left -= number
        assert spent <= (1 - reduction) * full
    together = fit_recipe(samples, 0.5, SHAPE)
    schemes = [[round(12 * share) for share in fit_recipe([sample], 0.5, SHAPE)] for sample in samples]
    assert [round(12 * share) for share in together] == [sum(column) // 3 for column in zip(*schemes, strict=True)]
    mixed = fit_recipe([samples[0], statistics(7, num_tokens=20)], 0.5, SHAPE)
    assert sum(mixed) < 1
    assert fit_recipe(samples, 0.9, SHAPE) is None, "the first of four layers alone costs a quarter"


# -- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)"])
def test_it_composes(beside):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    logits = []
    for methods in (["fitprune", beside], ["fitprune"]):
        with lmmhooks.wrap(zoo.model, *methods):
            logits.append(torch.stack(zoo.model.generate(**inputs, **KWARGS).logits))
    assert torch.isfinite(logits[0]).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_a_recipe_that_has_to_be_fitted_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    with pytest.raises(lmmhooks.MethodError, match="lmmhooks calibrate fitprune"):
        lmmhooks.wrap(build("llava").model, FitPrune(recipe=None))


def test_a_recipe_survives_being_written_down():
    method = FitPrune(recipe=RECIPE, reduction=0.5)
    assert lmmhooks.methods.resolve(method.spec()) == method
    assert lmmhooks.methods.resolve({"fitprune": method.settings()}) == method
    assert [cut.layer for cut in method.cuts(resolve(build("llava").model))] == [1, 3]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"reduction": 1.0}, "reduction"),
        ({"recipe": "llava-13b"}, "recipe"),
        ({"recipe": {0.5: [0.6, 0.6]}}, "recipe"),
        ({"recipe": {1.5: [0.1, 0.1]}}, "recipe"),
        ({"recipe": {0.5: [0.1], 0.6: [0.1, 0.1]}}, "recipe"),
        ({"recipe": {}}, "recipe"),
        ({"keep": 3}, "keep"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("fitprune", **settings)
