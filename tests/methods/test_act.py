"""Attention calibration against its naive rendering."""

from __future__ import annotations

import json

import pytest
import torch

import lmmhooks
from lmmhooks.engines import editing, segments
from lmmhooks.engines.editing import Edit
from lmmhooks.methods.attention.act import Act, calibrated_factors, later_sinks
from tests.reference.act import act, calibrate_row, sinks
from tests.reference.attention import dense_attention, full_logits, var
from tests.zoo import IMAGE, PAD, build

# float32 through five layers in another summation order; largest difference seen is 4e-6.
TOLERANCE = 1e-5
EVERY_HEAD = {2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}


def answer(zoo, inputs, method, steps=3, also=()):
    """Logits ``[B, steps, vocabulary]`` and tokens under a method."""
    with lmmhooks.wrap(zoo.model, method, *also):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(out.logits, dim=1), out.sequences[:, inputs["input_ids"].shape[1] :]


def compare(zoo, inputs, method, heads, steps=3, **settings):
    logits, tokens = answer(zoo, inputs, method, steps)
    plain = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -steps:]
    found = {}
    with dense_attention(zoo.model, act(inputs["input_ids"], heads, found=found, **settings)):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -steps:]
    assert (expected - plain).abs().amax(dim=-1).min() > 1e-2, "settings under which nothing is edited prove nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_equals_the_naive_rendering_at_prefill_and_decode(family):
    zoo = build(family, layers=5)
    found = compare(zoo, zoo.inputs(batch=2), Act(heads="all", thr=0.05), EVERY_HEAD, thr=0.05)
    assert len({tuple(chosen) for chosen in found.values()}) > 2, "heads and rows must differ in their sinks"


@pytest.mark.parametrize(
    ("settings", "naive"),
    [
        ({"heads": {2: [3, 0], 3: [1]}}, {"heads": {2: [0, 3], 3: [1]}, "thr": 0.1}),
        ({"heads": "all", "thr_mode": "relative", "alpha": 1.5}, {"thr": None, "alpha": 1.5}),
        ({"heads": "all", "thr": 0.05, "min_rows": 6}, {"thr": 0.05, "min_rows": 6}),
        ({"heads": "all", "thr": 0.05, "exclude_image": True}, {"thr": 0.05, "exclude_image": True}),
        ({"heads": "all", "thr": 0.05, "beta": 0.0}, {"thr": 0.05, "beta": 0.0}),
        ({"heads": {0: [1], 4: [2]}, "skip_layers": (), "thr": 0.05}, {"heads": {0: [1], 4: [2]}, "thr": 0.05}),
    ],
    ids=["head list", "relative threshold", "least rows", "image excluded", "sinks removed", "every layer"],
)
def test_every_setting_equals_the_naive_rendering(settings, naive):
    zoo = build("qwen2_5_vl", layers=5)
    naive = {"heads": EVERY_HEAD} | naive
    compare(zoo, zoo.inputs(batch=2), Act(**settings), naive.pop("heads"), **naive)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_on_either_side_and_rows_without_an_image(attn, padding):
    zoo = build("llava", attn=attn, layers=5)
    inputs = zoo.inputs(batch=3, images=[1, 0, 2], padding=padding)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Act(heads="all", thr=0.05)):
        logits = zoo.model(**inputs).logits
    with dense_attention(zoo.model, act(inputs["input_ids"], EVERY_HEAD, thr=0.05)):
        expected = full_logits(zoo.model, inputs)
    torch.testing.assert_close(logits[valid], expected[valid], atol=TOLERANCE, rtol=0)


def test_rows_that_look_at_nothing_but_sinks_keep_their_digits(monkeypatch):
    """With all keys but the first as sinks, rows hold nearly all of their mass on the set."""
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=2)
    method = Act(heads="all", thr=0.0)
    compare(zoo, inputs, method, EVERY_HEAD, thr=0.0)
    exact, _ = answer(zoo, inputs, method)
    monkeypatch.setattr(segments, "LEAST_REST", 0.0)
    cancelled, _ = answer(zoo, inputs, method)
    assert (cancelled - exact).abs().max() > TOLERANCE, "the closed form alone loses digits here"


def test_the_closed_form_equals_explicit_weights(monkeypatch):
    zoo = build("qwen3_vl", layers=5)
    inputs = zoo.inputs(batch=2)
    method = Act(heads={2: [0, 3], 3: [1]}, thr=0.05)
    fused, tokens = answer(zoo, inputs, method)
    monkeypatch.setattr(editing, "ROW_BLOCK", 7)
    monkeypatch.setattr(
        Edit, "_segment", lambda self, m: self._recompute([m], [], self.stage.rows(["all"], self.call.query.shape[2]))
    )
    dense, same_tokens = answer(zoo, inputs, method)
    assert torch.equal(tokens, same_tokens)
    torch.testing.assert_close(fused, dense, atol=TOLERANCE, rtol=0)


def test_a_row_sums_to_one_and_only_sinks_shrink():
    weights = torch.softmax(torch.randn(2, 3, 4, 10, generator=torch.Generator().manual_seed(0)), dim=-1)
    chosen = torch.zeros(2, 3, 10, dtype=torch.bool)
    chosen[..., [2, 7]] = True
    chosen[0, 0] = False
    out = Act(heads="all").reweight(weights, chosen)
    torch.testing.assert_close(out.sum(dim=-1), torch.ones(2, 3, 4))
    assert torch.equal(out[0, 0], weights[0, 0]), "without a sink nothing changes"
    torch.testing.assert_close(out[1][..., [2, 7]], weights[1][..., [2, 7]] * 0.4)
    for h in range(3):
        for i in range(4):
            naive = calibrate_row(weights[1, h, i].tolist(), [2, 7], 0.4)
            torch.testing.assert_close(out[1, h, i], torch.tensor(naive))


def test_a_row_that_sees_sinks_only_is_left_alone():
    inside, outside = calibrated_factors(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]), 0.4)
    torch.testing.assert_close(inside, torch.tensor([1.0, 0.4]))
    torch.testing.assert_close(outside, torch.tensor([1.0, 1.6]))


def test_the_first_detected_key_is_never_a_sink():
    received = torch.tensor([[[0.9, 0.0, 0.3, 0.2], [0.0, 0.05, 0.4, 0.0]], [[0.0, 0.0, 0.3, 0.9]] * 2])
    seen = torch.tensor([[4, 3, 2, 1], [0, 3, 2, 1]])
    found = later_sinks(received, seen, torch.tensor([0.1, 0.1]), min_rows=1)
    assert found.int().tolist() == [[[0, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 1]] * 2]
    assert not later_sinks(received, seen, torch.tensor([0.1, 0.1]), min_rows=2)[..., 3].any()


def test_padding_does_not_count_as_the_first_key():
    weights = [[0.0] * 4, [0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.4, 0.5, 0.1]]
    assert sinks(weights, [0, 9, 9, 9], thr=0.3, alpha=None, min_rows=1, exclude_image=False) == [2]


def test_heads_outside_the_list_and_the_first_row_do_not_change():
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=1)
    seen = {}

    def look(layer, values, row, hidden):
        seen.setdefault(layer, []).append(values)
        return values

    edit = act(inputs["input_ids"], {2: [1]}, thr=0.05)
    for change in (None, edit):
        with dense_attention(zoo.model, change, output=look):
            full_logits(zoo.model, inputs)
    plain, edited = seen[2]
    assert torch.equal(plain[[0, 2, 3]], edited[[0, 2, 3]])
    assert torch.equal(plain[1, 0], edited[1, 0])

    captured = {}
    module = zoo.model.model.language_model.layers[2].self_attn.o_proj
    hook = module.register_forward_pre_hook(lambda module, args: captured.update(states=args[0]))
    try:
        with torch.no_grad(), lmmhooks.wrap(zoo.model, Act(heads={2: [1]}, thr=0.05)):
            zoo.model(**inputs)
    finally:
        hook.remove()
    states = captured["states"].unflatten(-1, (4, -1))[0].transpose(0, 1)
    torch.testing.assert_close(states, edited, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("settings", [{"beta": 1.0}, {"thr": 1.0}, {"heads": {}}])
def test_strength_zero_attaches_nothing(settings):
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Act(**{"heads": "all", **settings})) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_a_prompt_in_which_nothing_is_a_sink_is_bit_identical():
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Act(heads="all", min_rows=10_000)) as patch:
            assert patch.attached
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_prompts_in_a_row_do_not_share_sinks():
    zoo = build("llava", layers=5)
    method = Act(heads="all", thr=0.05)
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, method):
            zoo.model.generate(**first, max_new_tokens=3)
            after_another = zoo.model(**second).logits
        with lmmhooks.wrap(zoo.model, method):
            fresh = zoo.model(**second).logits
    assert torch.equal(after_another, fresh)


@pytest.mark.parametrize("also", ["fastervlm(keep=4)", "random(keep=4)", "fastv(keep=4)", "vcd(beta=0.0)"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_composes_with_reducers_and_branches(family, also):
    """The edit shows, and a row of a padded batch gets the answer it gets alone."""
    zoo = build(family, layers=5)
    inputs = zoo.inputs(batch=2)
    method = Act(heads="all", thr=0.05)
    logits, tokens = answer(zoo, inputs, method, also=[also])
    without, _ = answer(zoo, inputs, Act(heads="all", beta=1.0), also=[also])
    assert (logits[:, 0] - without[:, 0]).abs().max() > 1e-2
    for i in range(2):
        alone, alone_tokens = answer(zoo, zoo.row(inputs, i), method, also=[also])
        torch.testing.assert_close(logits[i : i + 1], alone, atol=5 * TOLERANCE, rtol=0)
        assert torch.equal(tokens[i : i + 1], alone_tokens)


def test_beside_var_each_method_takes_its_own_sinks():
    """Var first, on text rows; then act on all rows, with sinks found before either edit, visual ones left to var."""
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=2)
    settings = {"thr": 0.05, "exclude_image": True}
    logits, tokens = answer(zoo, inputs, "var(sink_dims='any', tau=2.6, rho=0.3)", also=[Act(heads="all", **settings)])
    found = {}
    detect = act(inputs["input_ids"], EVERY_HEAD, found=found, **settings)
    move = var(0.6, 0.3, 0.2, 2.6, IMAGE, inputs["input_ids"], skip={0, 1, 4})

    def both(layer, weights, row, hidden):
        detect(layer, weights.clone(), row, hidden)
        weights = move(layer, weights, row, hidden)
        for h in EVERY_HEAD.get(layer, []):
            for i in range(weights.shape[1]):
                if i >= inputs["input_ids"].shape[1] or inputs["input_ids"][row, i] != PAD:
                    calibrated = calibrate_row(weights[h, i].tolist(), found[row, layer, h], 0.4)
                    weights[h, i] = weights.new_tensor(calibrated)
        return weights

    with dense_attention(zoo.model, both):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -3:]
    alone, _ = answer(zoo, inputs, Act(heads="all", **settings))
    assert (alone[:, 0] - logits[:, 0]).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_a_reducer_that_keeps_every_token_does_not_matter():
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=2)
    alone, _ = answer(zoo, inputs, Act(heads="all", thr=0.05))
    kept, _ = answer(zoo, inputs, Act(heads="all", thr=0.05), also=["random(keep=16)"])
    torch.testing.assert_close(kept, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 1.2},
        {"thr": -0.1},
        {"thr_mode": "mean"},
        {"alpha": 0},
        {"min_rows": 0},
        {"heads": "some"},
        {"heads": {"x": [1]}},
        {"heads": [[2, [0]], [2, [1]]]},
        {"heads": 3},
    ],
)
def test_bad_settings_are_refused_by_name(settings):
    name = next(iter(settings))
    with pytest.raises(lmmhooks.MethodError, match=f"act: {name}="):
        lmmhooks.method("act", **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"heads": {2: [0], 7: [1]}}, "layers 0 to 4 of 4 heads"),
        ({"heads": {2: [4]}}, "layers 0 to 4 of 4 heads"),
        ({"heads": {1: [0]}}, "skip_layers=.0, 1, -1. leaves alone"),
        ({"heads": "all", "skip_layers": (9,)}, "skip_layers"),
    ],
)
def test_lists_for_another_model_are_refused_at_wrap(settings, reason):
    zoo = build("llava", layers=5)
    with pytest.raises(lmmhooks.MethodError, match=reason):
        lmmhooks.wrap(zoo.model, Act(**settings))
    assert not zoo.model._forward_pre_hooks


def test_a_missing_list_is_refused_with_the_command_that_makes_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(lmmhooks.MethodError, match="lmmhooks calibrate act"):
        lmmhooks.wrap(build("llava", layers=5).model, "act")


def test_head_lists_are_read_as_mappings_of_any_key():
    method = Act(heads={"3": [1], 2: [5, 0, 5]})
    assert method.heads == ((2, (0, 5)), (3, (1,)))
    assert lmmhooks.methods.resolve("act(heads={3: [1], 2: [0, 5]})") == method
    assert lmmhooks.methods.resolve({"act": json.loads(json.dumps(method.settings()))}) == method
    assert lmmhooks.methods.resolve("act(preset='mt-bench', heads='all')").thr == 0.15
