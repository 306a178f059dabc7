"""AdaptVis and ScalingVis against their naive rendering."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines.passes import PlainPasses
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.attention.adaptvis import AdaptVis, choose_weights, confidence
from tests.methods.dense import TOLERANCE, answer, equals_dense
from tests.reference import scaling
from tests.reference.attention import dense_attention, full_logits
from tests.reference.scaling import scaling_vis
from tests.zoo import FAMILIES, IMAGE, build


def confidences(zoo, inputs):
    """Of each row, from a plain forward."""
    return [scaling.confidence(logits) for logits in full_logits(zoo.model, inputs)[:, -1]]


def sure_and_unsure(zoo, **kwargs):
    """A batch of two, one row of which is surer than the other, and AdaptVis with a threshold between them."""
    for seed in range(20):
        inputs = zoo.inputs(batch=2, seed=seed, **kwargs)
        found = confidences(zoo, inputs)
        # Further apart than rounding could move either.
        if abs(found[0] - found[1]) >= 0.02:
            method = AdaptVis(low=0.4, high=1.8, threshold=sum(found) / 2)
            return inputs, method, [0.4 if sure < method.threshold else 1.8 for sure in found]
    raise AssertionError("rows that are equally sure prove nothing")


@pytest.mark.parametrize("family", FAMILIES)
def test_adaptvis_equals_the_naive_rendering(family):
    zoo = build(family)
    inputs, method, weights = sure_and_unsure(zoo)
    assert not inputs["attention_mask"].all()
    equals_dense(zoo, inputs, method, scores=scaling_vis(IMAGE, inputs["input_ids"], weights))


@pytest.mark.parametrize("weight", [0, 0.5, 2.0])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_scaling_vis_equals_the_naive_rendering(family, weight, monkeypatch):
    monkeypatch.setattr(PlainPasses, "run", lambda *args, **kwargs: pytest.fail("one weight for all needs no reading"))
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    equals_dense(zoo, inputs, AdaptVis(weight=weight), scores=scaling_vis(IMAGE, inputs["input_ids"], [weight] * 2))


@pytest.mark.parametrize(("images", "changed"), [([2, 1], (0, 1)), ([0, 2], (1,))])
def test_every_row_has_its_own_images(images, changed):
    zoo = build("llava")
    inputs, method, weights = sure_and_unsure(zoo, images=images)
    equals_dense(zoo, inputs, method, changed, scores=scaling_vis(IMAGE, inputs["input_ids"], weights))


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5}], ids=["adaptvis", "scaling_vis"])
def test_a_prompt_without_image_is_left_alone(settings, monkeypatch):
    monkeypatch.setattr(PlainPasses, "run", lambda *args, **kwargs: pytest.fail("there is no image to be sure about"))
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=0)
    tokens, logits = answer(zoo, inputs, AdaptVis(**settings))
    plain = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -3:]
    torch.testing.assert_close(logits, plain, atol=TOLERANCE, rtol=0)


def test_confidence_at_the_threshold_is_sure():
    for hundredths in range(2, 101):
        p = torch.tensor([hundredths / 100], dtype=torch.float64)
        others = ((1 - p) / 100).expand(100)
        logits = torch.cat([p, others]).log().clamp(min=-1e4).float()[None]
        sure = confidence(logits)
        assert choose_weights(sure, hundredths / 100, 0.5, 1.5).tolist() == [1.5], f"{float(sure)!r}"
        assert choose_weights(sure, (hundredths + 1) / 100, 0.5, 1.5).tolist() == [0.5], f"{float(sure)!r}"
        assert float(sure) == pytest.approx(scaling.confidence(logits[0]))


def test_confidence_is_rounded_before_it_is_compared():
    logits = torch.tensor([0.396] + [0.604 / 4] * 4).log()[None]
    assert float(confidence(logits)) == pytest.approx(0.4)
    assert choose_weights(confidence(logits), 0.4, 0.5, 1.5).tolist() == [1.5]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_only_the_last_row_of_the_prompt_changes(padding):
    zoo = build("llava", layers=1)
    inputs = zoo.inputs(batch=2, padding=padding)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, AdaptVis(weight=0.3)):
            edited = zoo.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    last = real & (real.flip(1).cumsum(1).flip(1) == 1)
    assert torch.equal(edited[real & ~last], plain[real & ~last])
    assert (edited[last] - plain[last]).abs().amax(dim=-1).min() > 1e-3


def test_generated_rows_are_computed_by_the_model_alone():
    """Over the cache of a plain prompt, a decode step is bit for bit that of the plain model."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    token = torch.tensor([[20]])
    plain, edited = DynamicCache(), DynamicCache()
    with torch.no_grad():
        zoo.model(**inputs, past_key_values=plain)
        prompt = [(layer.keys.clone(), layer.values.clone()) for layer in plain.layers]
        expected = zoo.model(input_ids=token, past_key_values=plain).logits
        with lmmhooks.wrap(zoo.model, AdaptVis(weight=0.3)):
            zoo.model(**inputs, past_key_values=edited)
            for layer, (keys, values) in zip(edited.layers, prompt, strict=True):
                layer.keys.copy_(keys)
                layer.values.copy_(values)
            assert torch.equal(zoo.model(input_ids=token, past_key_values=edited).logits, expected)


@pytest.mark.parametrize("settings", [{"weight": 1}, {"low": 1.0, "high": 1.0}])
def test_strength_zero_attaches_nothing(settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, AdaptVis(**settings)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_prompts_in_a_row_do_not_share_a_weight():
    zoo = build("llava")
    first = zoo.inputs(batch=1, seed=1)
    sure = confidences(zoo, first)[0]
    others = (zoo.inputs(batch=1, seed=seed) for seed in range(2, 22))
    # Further apart than rounding could move either; prompts that are equally sure prove nothing.
    second = next(inputs for inputs in others if abs(confidences(zoo, inputs)[0] - sure) >= 0.02)
    found = [sure, confidences(zoo, second)[0]]
    method = AdaptVis(low=0.4, high=1.8, threshold=sum(found) / 2)
    mine, others = (0.4, 1.8) if found[1] < found[0] else (1.8, 0.4)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, method):
            zoo.model.generate(**first, max_new_tokens=3)
            after_another = zoo.model(**second).logits
        with lmmhooks.wrap(zoo.model, method):
            fresh = zoo.model(**second).logits
        for weight, same in ((mine, True), (others, False)):
            with lmmhooks.wrap(zoo.model, AdaptVis(weight=weight)):
                assert torch.equal(zoo.model(**second).logits, fresh) == same
    assert torch.equal(after_another, fresh)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("reducer", ["random(keep=4, positions='keep')", "fastervlm(keep=4, positions='keep')"])
def test_beside_a_reducer_confidence_is_that_of_the_whole_prompt(reducer, family):
    zoo = build(family)
    inputs, method, weights = sure_and_unsure(zoo)
    ids = inputs["input_ids"]
    tokens, logits = answer(zoo, inputs, reducer, method)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, reducer):
        zoo.model(**inputs)
        index = find_runtime(zoo.model).last.stages[0].index
    reference = scaling_vis(IMAGE, ids, weights)

    def scores(layer, values, row, hidden):
        values = reference(layer, values, row, hidden)
        gone = [j for j in range(ids.shape[1]) if ids[row, j] == IMAGE and j not in index[row].tolist()]
        values[:, :, gone] = -1e30
        return values

    with dense_attention(zoo.model, scores=scores):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -3:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_beside_contrastive_decoding_each_reading_has_its_confidence():
    zoo = build("llava")
    inputs, method, _ = sure_and_unsure(zoo)
    plain = answer(zoo, inputs, "vcd(beta=0.0)")[1]
    tokens, logits = answer(zoo, inputs, method, "vcd(beta=0.0)")
    assert torch.isfinite(logits).all()
    assert (logits - plain).abs().max() > 1e-2
    for row in range(2):
        one, one_logits = answer(zoo, zoo.row(inputs, row), method, "vcd(beta=0.0)")
        assert torch.equal(tokens[row : row + 1], one)
        # Four readings in one batch against two: the same sums in another order, doubled by the contrast.
        torch.testing.assert_close(logits[row : row + 1], one_logits, atol=5e-5, rtol=0)


def test_presets_name_the_published_settings():
    assert lmmhooks.methods.resolve("adaptvis(preset='adapt_vis')") == AdaptVis()
    assert lmmhooks.methods.resolve("adaptvis(preset='scaling_vis')").weight == 0.8
    assert lmmhooks.methods.resolve("adaptvis(preset='readme')").spec() == "adaptvis(high=1.2, threshold=0.3)"


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"weight": -0.5}, "weight must be at least 0 or None"),
        ({"low": -0.5}, "low must be at least 0"),
        ({"high": float("nan")}, "high must be at least 0"),
        ({"threshold": 1.1}, r"threshold must be in \[0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, allowed):
    with pytest.raises(lmmhooks.MethodError, match=allowed):
        lmmhooks.method("adaptvis", **settings)
