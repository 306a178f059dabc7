"""Visual amplification fusion against its naive rendering."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.attention.vaf import Vaf, key_factors, looking_heads
from tests.methods.dense import TOLERANCE, answer, continues_alike, equals_dense
from tests.reference.attention import dense_attention, full_logits
from tests.reference.scaling import vaf
from tests.zoo import FAMILIES, IMAGE, build

# Of eight layers, 2 to 4 lie where 9 to 14 lie of 32.
DEPTH, LAYERS = 8, range(2, 5)
# Stronger than published, so that three layers of a random model show it.
STRONG = {"enh": 1.6, "sup": 0.4}


@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, fused, monkeypatch):
    monkeypatch.setattr(editing, "FUSED_ROWS", 1 if fused else 10**6)
    zoo = build(family, layers=DEPTH)
    inputs = zoo.inputs(batch=2)
    assert not inputs["attention_mask"].all()
    equals_dense(zoo, inputs, Vaf(**STRONG), scores=vaf(IMAGE, inputs["input_ids"], LAYERS, **STRONG))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_heads_that_look_at_the_image(family):
    zoo = build(family, layers=DEPTH)
    inputs = zoo.inputs(batch=2)
    reference = vaf(IMAGE, inputs["input_ids"], LAYERS, **STRONG, head_fraction=0.5)
    equals_dense(zoo, inputs, Vaf(**STRONG, head_fraction=0.5), scores=reference)


def test_heads_that_look_at_the_image_through_the_backend(monkeypatch):
    """Where heads share no keys, the fused form serves factors per head too."""
    monkeypatch.setattr(editing, "FUSED_ROWS", 1)
    zoo = build("llava", layers=DEPTH, num_key_value_heads=4)
    inputs = zoo.inputs(batch=2)
    reference = vaf(IMAGE, inputs["input_ids"], LAYERS, **STRONG, head_fraction=0.5)
    equals_dense(zoo, inputs, Vaf(**STRONG, head_fraction=0.5), scores=reference)


@pytest.mark.parametrize("head_fraction", [1.0, 0.5])
@pytest.mark.parametrize(("images", "changed"), [([2, 1], (0, 1)), ([0, 2], (1,))])
def test_every_row_has_its_own_spans(images, changed, head_fraction):
    zoo = build("llava", layers=DEPTH)
    inputs = zoo.inputs(batch=2, images=images)
    reference = vaf(IMAGE, inputs["input_ids"], LAYERS, **STRONG, head_fraction=head_fraction)
    equals_dense(zoo, inputs, Vaf(**STRONG, head_fraction=head_fraction), changed, scores=reference)


@pytest.mark.parametrize("head_fraction", [1.0, 0.5])
def test_a_prompt_without_image_is_left_alone(head_fraction):
    zoo = build("llava", layers=DEPTH)
    inputs = zoo.inputs(batch=2, images=0)
    tokens, logits = answer(zoo, inputs, Vaf(**STRONG, head_fraction=head_fraction))
    plain = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -3:]
    torch.testing.assert_close(logits, plain, atol=TOLERANCE, rtol=0)


def test_factors_leave_padding_and_text_after_the_image_alone():
    visual = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 0]]).bool()
    system = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    expected = torch.tensor([[1, 0.5, 0.5, 2, 2, 1, 2, 1]])
    assert torch.equal(key_factors(visual, system, enh=2.0, sup=0.5), expected)


def test_heads_are_ranked_by_mass_on_the_image():
    weights = torch.tensor(
        [[[0.1, 0.8, 0.1], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5]], [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]]
    )
    visual = torch.tensor([[False, True, True], [True, False, False]])
    assert looking_heads(weights, visual, 1).tolist() == [[True, False, False], [True, False, False]]
    assert looking_heads(weights, visual, 2)[0].tolist() == [True, False, True]


def test_rows_up_to_the_image_and_other_layers_stay_as_they_were():
    zoo = build("llava", layers=3)
    inputs = zoo.inputs(batch=1)
    ids = inputs["input_ids"][0].tolist()
    after = len(ids) - ids[::-1].index(IMAGE)
    with torch.no_grad():
        plain = zoo.model(**inputs, output_hidden_states=True).hidden_states
        with lmmhooks.wrap(zoo.model, Vaf(**STRONG, start=1, end=2)) as patch:
            edited = zoo.model(**inputs, output_hidden_states=True).hidden_states
            assert [name for name in patch.attached if "attention of" in name] == [
                "forward pre-hook attention of decoder layer 1"
            ]
    assert torch.equal(edited[1], plain[1]), "output of layer 0"
    for layer in (2, 3):
        assert torch.equal(edited[layer][:, :after], plain[layer][:, :after])
        assert (edited[layer][:, after:] != plain[layer][:, after:]).any(dim=-1).all()


@pytest.mark.parametrize("fused_rows", [1, 128])
def test_the_cache_holds_the_original_keys(fused_rows, monkeypatch):
    monkeypatch.setattr(editing, "FUSED_ROWS", fused_rows)
    zoo = build("llava", layers=1)
    inputs = zoo.inputs(batch=2)
    plain, edited = DynamicCache(), DynamicCache()
    with torch.no_grad():
        zoo.model(**inputs, past_key_values=plain)
        with lmmhooks.wrap(zoo.model, Vaf(**STRONG, start=0, end=1)):
            zoo.model(**inputs, past_key_values=edited)
    assert torch.equal(edited.layers[0].keys, plain.layers[0].keys)


@pytest.mark.parametrize(("depth", "expected"), [(32, (9, 15)), (40, (11, 19)), (28, (8, 13)), (4, (1, 3))])
def test_layers_scale_with_depth(depth, expected):
    family = SimpleNamespace(num_layers=depth, num_heads=8)
    assert Vaf().layers(family) == range(*expected)
    bound = Vaf(head_fraction=0.5).bind(family)
    assert (bound.start, bound.end, bound.head_fraction) == (*expected, 0.5)


def test_strength_zero_attaches_nothing():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, "vaf(enh=1.0, sup=1.0)") as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_prompts_in_a_row_do_not_share_heads():
    zoo = build("llava")
    method = Vaf(**STRONG, head_fraction=0.5)
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, method):
            zoo.model.generate(**first, max_new_tokens=3)
            memory = find_runtime(zoo.model).last.memory(*find_runtime(zoo.model).methods())
            of_first = {layer: chosen.clone() for layer, chosen in memory.items()}
            after_another = zoo.model(**second).logits
            memory = find_runtime(zoo.model).last.memory(*find_runtime(zoo.model).methods())
            assert any(not torch.equal(memory[layer], chosen) for layer, chosen in of_first.items())
        with lmmhooks.wrap(zoo.model, method):
            fresh = zoo.model(**second).logits
    assert torch.equal(after_another, fresh)


@pytest.mark.parametrize("head_fraction", [1.0, 0.5])
def test_several_tokens_at_once_continue_like_one_by_one(head_fraction):
    continues_alike(build("llava"), Vaf(**STRONG, head_fraction=head_fraction))


@pytest.mark.parametrize("head_fraction", [1.0, 0.5])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("reducer", ["random(keep=4, positions='keep')", "fastervlm(keep=4, positions='keep')"])
def test_below_a_reducer_it_edits_the_tokens_that_are_left(reducer, family, head_fraction):
    zoo = build(family, layers=DEPTH)
    inputs = zoo.inputs(batch=2)
    ids = inputs["input_ids"]
    tokens, logits = answer(zoo, inputs, reducer, Vaf(**STRONG, head_fraction=head_fraction))
    with torch.no_grad(), lmmhooks.wrap(zoo.model, reducer):
        zoo.model(**inputs)
        index = find_runtime(zoo.model).last.stages[0].index
    dropped = {
        (row, j)
        for row in range(2)
        for j in range(ids.shape[1])
        if ids[row, j] == IMAGE and j not in index[row].tolist()
    }
    reference = vaf(IMAGE, ids, LAYERS, **STRONG, head_fraction=head_fraction, dropped=dropped)

    def scores(layer, values, row, hidden):
        values = reference(layer, values, row, hidden)
        for sample, j in dropped:
            if sample == row:
                values[:, :, j] = -1e30
        return values

    with dense_attention(zoo.model, scores=scores):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -3:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_beside_contrastive_decoding_each_reading_is_edited():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = answer(zoo, inputs, "vcd(beta=0.0)")[1]
    tokens, logits = answer(zoo, inputs, Vaf(**STRONG), "vcd(beta=0.0)")
    assert torch.isfinite(logits).all()
    assert (logits - plain).abs().max() > 1e-2
    for row in range(2):
        one, one_logits = answer(zoo, zoo.row(inputs, row), Vaf(**STRONG), "vcd(beta=0.0)")
        assert torch.equal(tokens[row : row + 1], one)
        # Four readings in one batch against two: the same sums in another order, doubled by the contrast.
        torch.testing.assert_close(logits[row : row + 1], one_logits, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"enh": -0.1}, "enh must be at least 0"),
        ({"enh": float("inf")}, "enh must be at least 0"),
        ({"sup": -1.0}, "sup must be at least 0"),
        ({"start": -1}, "start must be at least 0 or None"),
        ({"end": 0}, "end must be at least 1 or None"),
        ({"head_fraction": 0.0}, r"head_fraction must be in \(0, 1\]"),
        ({"head_fraction": 1.5}, r"head_fraction must be in \(0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, allowed):
    with pytest.raises(lmmhooks.MethodError, match=allowed):
        lmmhooks.method("vaf", **settings)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"end": 5}, "end=5 is not allowed; end must be at most 4"),
        ({"start": 3, "end": 2}, "start=3 is not allowed; start must be below end=2"),
        ({"end": 1}, "start=1 is not allowed; start must be below end=1"),
        ({"head_fraction": 0.2}, "head_fraction must be at least 1/4: this model has 4 heads"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_at_wrap(settings, allowed):
    zoo = build("llava")
    with pytest.raises(lmmhooks.MethodError, match=allowed):
        lmmhooks.wrap(zoo.model, lmmhooks.method("vaf", **settings))
    assert not zoo.model._forward_pre_hooks
