"""V2Drop against states noted layer by layer, one token at a time."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.staging import scaled_layers
from lmmhooks.methods.reduction.v2drop import V2Drop, variation
from tests.methods.cuts import KWARGS, SEVERAL, equals_rendering, kept, same_bits
from tests.reference.decoder_cuts import v2drop
from tests.zoo import build

DISTANCES = {
    "l2": lambda a, b: ((b - a) ** 2).sum() ** 0.5,
    "l1": lambda a, b: (b - a).abs().sum(),
    "cosine": lambda a, b: 1 - (a @ b) / (a.norm() * b.norm()),
}


@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering_at_prefill_and_decode(family):
    ratios = {1: 0.75, 2: 0.6, 3: 0.3}

    def cuts(zoo, inputs, row, images):
        return v2drop([n for image in images for n in image], ratios, DISTANCES["l2"])

    equals_rendering(family, V2Drop(layers=(1, 2, 3), ratios=tuple(ratios.values())), cuts)


@pytest.mark.parametrize("metric", DISTANCES)
def test_metrics(metric):
    def cuts(zoo, inputs, row, images):
        return v2drop([n for image in images for n in image], {2: 0.4}, DISTANCES[metric])

    equals_rendering("llava", V2Drop(layers=(2,), ratios=(0.4,), metric=metric), cuts)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 7, generator=generator)
    expected = torch.stack([DISTANCES[metric](x, y) for x, y in zip(a, b, strict=True)])
    # float32 sums of seven numbers.
    torch.testing.assert_close(variation(a, b, metric), expected, atol=1e-6, rtol=1e-6)


def test_counts_follow_the_tokens_at_hand_and_sets_are_nested():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    sets = kept(zoo, inputs, V2Drop(layers=(1, 2, 3), ratios=(0.7, 0.7, 0.0)))
    visual = set((inputs["input_ids"][0] == zoo.model.config.image_token_id).nonzero().flatten().tolist())
    # int(16 * .7) = 11, int(11 * .7) = 7, where int(16 * .49) = 7 too; the last cut leaves one token, not none.
    assert [len(found & visual) for found in sets] == [16, 11, 7, 1]
    assert sets[3] < sets[2] < sets[1] < sets[0]
    counts, left = [], 577
    for ratio in V2Drop().ratios:
        left = V2Drop().count(ratio, left)
        counts.append(left)
    assert counts == [288, 144, 1]
    assert [sum(n * layers for n, layers in zip((576, 288, 144, 1), (3, 14, 5, 10), strict=True)) / 32] == [202.8125]


def test_positions_are_the_original_ones_and_the_answer_continues_the_full_prompt():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    seen = []
    with lmmhooks.wrap(zoo.model, V2Drop()):
        hook = zoo.model.model.language_model.layers[3].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
        )
        out = zoo.model.generate(**inputs, **KWARGS)
        hook.remove()
    prompt = inputs["input_ids"].shape[1]
    sets = kept(zoo, inputs, V2Drop())
    assert seen == [sorted(sets[3]), [prompt], [prompt + 1]]
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [len(found) + 2 for found in sets]


def test_published_layers_are_scaled_to_the_depth():
    assert scaled_layers((3, 17, 22), 32) == (3, 17, 22)
    assert scaled_layers((3, 17, 22), 28) == (3, 15, 19)
    assert [cut.layer for cut in V2Drop().cuts(resolve(build("llava").model))] == [1, 2, 3]
    assert scaled_layers((3, 17, 22), 2) == (1, 2, 3), (
        "a shallow decoder runs past its last layer, where nothing is cut"
    )


def test_ratios_of_one_change_nothing():
    same_bits("llava", V2Drop(ratios=(1.0, 1.0, 1.0)))


def test_a_budget_is_met():
    zoo = build("llava")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, V2Drop(budget=10)) as patch:
        zoo.model(**zoo.inputs(batch=2, images=[2, 1]))
        per_row = list(zip(*(layer.visual_kept for layer in patch.stats.layers), strict=True))
    for images, counts in zip((2, 1), per_row, strict=True):
        # Three cuts of whole tokens per image: at most one token each below what is allowed.
        assert 10 * images - 3 * images / 4 <= sum(counts) / 4 <= 10 * images


@pytest.mark.parametrize("beside", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)", "fastervlm(keep=8)"])
def test_it_composes(beside):
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    logits = []
    for methods in (["v2drop", beside], ["v2drop"]):
        with lmmhooks.wrap(zoo.model, *methods):
            logits.append(torch.stack(zoo.model.generate(**inputs, **KWARGS).logits))
    assert torch.isfinite(logits[0]).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"ratios": (0.5,)}, "ratios"), ({"ratios": (0.5, -0.1, 0)}, "ratios"), ({"metric": "l3"}, "metric")],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("v2drop", **settings)
