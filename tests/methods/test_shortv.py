"""ShortV against dense layers whose visual rows are overwritten, and its published lists and figures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lmmhooks
from lmmhooks import cost
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.shortv import PUBLISHED, ShortV, layer_contribution
from tests.methods.rendered import SEVERAL, equals_rendering, prompts_of, same_bits
from tests.zoo import build


@pytest.mark.parametrize("family", [*SEVERAL, "qwen2_vl", "llava_onevision"])
def test_equals_layers_with_visual_rows_overwritten(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    equals_rendering(zoo, inputs, ShortV(layers=(0, 2, 3)), prompts_of(zoo, inputs), frozen=(0, 2, 3))


def test_a_number_takes_that_many_from_the_front():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    equals_rendering(zoo, inputs, ShortV(layers=(3, 1, 0), num_layers=2), prompts_of(zoo, inputs), frozen=(1, 3))


@pytest.mark.parametrize("settings", [{"layers": ()}, {"layers": (1, 2), "num_layers": 0}])
def test_no_layer_is_no_change(settings):
    method = ShortV(**settings)
    same_bits(build("qwen3_vl"), method)
    with lmmhooks.wrap(build("llava").model, method) as patch:
        assert patch.attached == []


def test_the_contribution_of_a_layer_is_the_divergence_of_the_released_code():
    full, frozen = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.kl_div(full.log_softmax(-1), frozen.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(layer_contribution(full, frozen), loss)
    assert (layer_contribution(full, frozen) - layer_contribution(frozen, full)).abs().max() > 1e-2
    assert torch.equal(layer_contribution(full, full), torch.zeros(3))


@pytest.mark.parametrize(("key", "number"), [(key, 19 if key[2] == 32 else 24) for key in PUBLISHED])
def test_published_lists_are_the_defaults(key, number):
    family = SimpleNamespace(name=key[0], hidden_size=key[1], num_layers=key[2])
    layers = ShortV.defaults_for(family)["layers"]
    assert len(layers) == len(set(layers)) == number
    method = ShortV(layers=layers).bind(family)
    method.check(family)
    assert method.num_layers is None
    assert list(method.frozen_layers(family)) == list(layers)
    assert ShortV(layers=layers, num_layers=3).frozen_layers(family) == layers[:3]
    assert ShortV.defaults_for(SimpleNamespace(name="llava", hidden_size=64, num_layers=4)) == {}


def test_of_a_measured_order_the_share_of_the_paper_is_taken():
    for depth, number in ((32, 19), (40, 24), (28, 17)):
        assert ShortV().bind(SimpleNamespace(num_layers=depth)).num_layers == number
        assert ShortV(layers="order.json").bind(SimpleNamespace(num_layers=depth)).num_layers == number
        assert ShortV(layers=(1, 2)).bind(SimpleNamespace(num_layers=depth)).num_layers is None


def test_the_published_cost():
    """LLaVA-1.5-7B with 64 text and 576 visual tokens: 8.5 to 4.7 TFLOPs, 55.2 %."""
    shape = cost.DecoderShape(32, 4096, 4096, 11008, 32000)
    dense = cost.LayerCounts.dense(640)
    frozen = cost.LayerCounts.frozen_visual(64, 576)
    full, short = (2 * cost.prefill_macs(shape, [dense] * (32 - n) + [frozen] * n) for n in (0, 19))
    assert (round(full / 1e12, 1), round(short / 1e12, 1), round(short / full, 3)) == (8.5, 4.7, 0.552)


def test_statistics_count_what_was_left_out():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, ShortV(layers=(1, 2))) as patch:
        zoo.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        stats = patch.stats
    shape = cost.DecoderShape.from_config(zoo.model.config.text_config)
    expected = full = 0.0
    for row in range(2):
        text = int(inputs["attention_mask"][row].sum()) - 16
        dense, frozen = cost.LayerCounts.dense(text + 16), cost.LayerCounts.frozen_visual(text, 16)
        expected += 2 * cost.prefill_macs(shape, [dense, frozen, frozen, dense])
        full += 2 * cost.prefill_macs(shape, [dense] * 4)
    assert stats.prefill_flops == pytest.approx(expected)
    assert stats.prefill_flops_full == pytest.approx(full)
    assert stats.kv_bytes == stats.kv_bytes_full
    assert [layer.visual_kept for layer in stats.layers] == [(16, 16)] * 4


def test_it_composes_with_fastv():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    saved = []
    for methods in (["fastv(keep=4)"], ["shortv(layers=(0, 3))"], ["fastv(keep=4)", "shortv(layers=(0, 3))"]):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, *methods) as patch:
            assert torch.isfinite(zoo.model(**inputs).logits).all()
            saved.append(patch.stats.flops_saved)
    assert saved[2] > max(saved[:2]) > 0


def test_two_prompts_in_turn():
    zoo = build("llava")
    first, second = zoo.inputs(batch=1), zoo.inputs(batch=2, images=[2, 1], seed=3)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ShortV(layers=(1,))):
        expected = zoo.model(**second).logits
        zoo.model(**first)
        assert torch.equal(zoo.model(**second).logits, expected)
        zoo.model(**zoo.inputs(batch=1, images=0))
        assert not find_runtime(zoo.model).last.computing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"layers": "all"}, "path that ends in .json"),
        ({"layers": (1, 2), "num_layers": 3}, "at most 2, the layers listed"),
        ({"num_layers": -1}, "num_layers"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(lmmhooks.MethodError, match=message):
        ShortV(**settings)


def test_layers_a_model_does_not_have_are_refused_at_wrap():
    zoo = build("llava")
    with pytest.raises(lmmhooks.MethodError, match="layers of this model, 0 to 3"):
        lmmhooks.wrap(zoo.model, ShortV(layers=(4,)))
    with pytest.raises(lmmhooks.MethodError, match="num_layers must be at most 4"):
        lmmhooks.wrap(zoo.model, ShortV(num_layers=5))


def test_an_order_that_was_not_measured_is_asked_for():
    with pytest.raises(lmmhooks.MethodError, match=r"layers has to be measured.*lmmhooks calibrate shortv"):
        lmmhooks.wrap(build("llava").model, "shortv")
