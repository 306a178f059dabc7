"""Image-guided head suppression against its naive rendering."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.attention.spin import Spin, head_gains, image_key_sum, summed_logits
from tests.methods.dense import TOLERANCE, answer, continues_alike, equals_dense
from tests.reference.attention import dense_attention, full_logits
from tests.reference.scaling import spin, vaf
from tests.zoo import FAMILIES, IMAGE, build

SETTINGS = {"keep_ratio": 0.5, "gain": 0.08}
SCORES = pytest.mark.parametrize("score", ["logits", "mass"])


@SCORES
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, score):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    assert not inputs["attention_mask"].all()
    reference = spin(IMAGE, inputs["input_ids"], **SETTINGS, layers=range(4), mass=score == "mass")
    equals_dense(zoo, inputs, Spin(**SETTINGS, score=score), **reference)


@SCORES
@pytest.mark.parametrize(("images", "changed"), [([2, 1], (0, 1)), ([0, 2], (1,))])
def test_every_row_ranks_its_own_heads(images, changed, score):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=images)
    reference = spin(IMAGE, inputs["input_ids"], **SETTINGS, layers=range(1, 3), mass=score == "mass")
    equals_dense(zoo, inputs, Spin(**SETTINGS, start=1, end=3, score=score), changed, **reference)


def test_the_two_scores_disagree():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    by_logits, by_mass = (answer(zoo, inputs, Spin(**SETTINGS, score=score))[1] for score in ("logits", "mass"))
    assert (by_logits - by_mass).abs().max() > 1e-3, "otherwise one setting would do for both"


@SCORES
def test_rows_without_image_are_bit_identical(score):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[0, 1])
    tokens, logits = answer(zoo, inputs, Spin(**SETTINGS, score=score))
    plain_tokens, plain = answer(zoo, inputs, "attention-identity")
    assert torch.equal(tokens[0], plain_tokens[0])
    assert torch.equal(logits[0], plain[0])
    assert not torch.equal(logits[1], plain[1])


def test_summed_keys_give_the_sum_of_logits():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 6, 3, 8, generator=generator), torch.randn(2, 2, 11, 8, generator=generator)
    visual = torch.rand(2, 11, generator=generator) < 0.5
    score = summed_logits(queries, image_key_sum(keys, visual), scaling=0.35)
    for b in range(2):
        for h in range(6):
            for r in range(3):
                logits = [0.35 * queries[b, h, r] @ keys[b, h // 3, j] for j in range(11) if visual[b, j]]
                # A sum of at most eleven dot products in another order.
                torch.testing.assert_close(score[b, h, r], torch.stack(logits).sum(), atol=1e-5, rtol=1e-5)


def test_sums_of_half_precision_keys_are_exact():
    """576 equal keys of 1 + 1/128 sum to 580.5, which bfloat16 cannot hold: it would round each partial sum."""
    keys = torch.full((1, 1, 576, 4), 1 + 1 / 128, dtype=torch.bfloat16)
    total = image_key_sum(keys, torch.ones(1, 576, dtype=torch.bool))
    assert torch.equal(total, torch.full((1, 1, 4), 580.5))


def test_gains_keep_the_best_heads_of_every_row():
    scores = torch.tensor([[[3.0, -1.0], [1.0, 5.0], [2.0, 0.0]]])
    assert head_gains(scores, 2, 0.1).tolist() == [[[1.0, pytest.approx(0.1)], [pytest.approx(0.1), 1.0], [1.0, 1.0]]]
    assert torch.equal(head_gains(scores, 0, 0.0), torch.zeros(1, 3, 2))


@pytest.mark.parametrize(("keep_ratio", "kept"), [(0.95, 3), (0.5, 2), (0.49, 1), (0.1, 0)])
def test_the_number_of_kept_heads_is_rounded_down(keep_ratio, kept):
    zoo = build("llava", layers=1)
    inputs = zoo.inputs(batch=2)
    before, after = [], []
    module = zoo.model.model.language_model.layers[0].self_attn.o_proj
    with torch.no_grad():
        for seen, methods in ((before, ["attention-identity"]), (after, [Spin(keep_ratio=keep_ratio, gain=0.0)])):
            handle = module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            with lmmhooks.wrap(zoo.model, *methods):
                zoo.model(**inputs)
            handle.remove()
    plain, edited = (seen[0].view(*seen[0].shape[:2], 4, 16) for seen in (before, after))
    assert torch.equal(edited[:, :-1], plain[:, :-1]), "only the last row of the prompt"
    silent = (edited[:, -1] == 0).all(dim=-1)
    assert silent.sum(dim=1).tolist() == [4 - kept] * 2
    assert torch.equal(edited[:, -1][~silent], plain[:, -1][~silent])


@pytest.mark.parametrize("settings", [{"keep_ratio": 1.0}, {"gain": 1.0}])
def test_strength_zero_attaches_nothing(settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Spin(**settings)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


@SCORES
def test_two_prompts_in_a_row_do_not_share_image_keys(score):
    zoo = build("llava")
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    method = Spin(**SETTINGS, score=score)
    with lmmhooks.wrap(zoo.model, method):
        zoo.model.generate(**first, max_new_tokens=3)
        settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        after_another = zoo.model.generate(**second, **settings).logits
    fresh = answer(zoo, second, method)[1]
    assert torch.equal(torch.stack(after_another, dim=1), fresh)


@SCORES
def test_several_tokens_at_once_continue_like_one_by_one(score):
    continues_alike(build("llava"), Spin(**SETTINGS, score=score))


@SCORES
def test_after_another_method_of_the_layer_heads_are_ranked_by_unedited_attention(score):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    ids = inputs["input_ids"]
    strong = {"enh": 1.6, "sup": 0.4}
    reference = spin(IMAGE, ids, **SETTINGS, layers=range(4), mass=score == "mass")
    amplify = vaf(IMAGE, ids, range(1, 3), **strong)

    def scores(layer, values, row, hidden):
        length = values.shape[1]
        hidden_keys = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden_keys[:, : ids.shape[1]] |= ids[row] == 0
        unedited = torch.softmax(values.masked_fill(hidden_keys, -1e30), dim=-1) if score == "mass" else values
        reference["edit" if score == "mass" else "scores"](layer, unedited, row, hidden)
        return amplify(layer, values, row, hidden)

    methods = [lmmhooks.method("vaf", **strong), Spin(**SETTINGS, score=score)]
    equals_dense(zoo, inputs, methods, scores=scores, output=reference["output"])


@SCORES
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("reducer", ["random(keep=4, positions='keep')", "fastervlm(keep=4, positions='keep')"])
def test_below_a_reducer_it_scores_by_the_tokens_that_are_left(reducer, family, score):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    ids = inputs["input_ids"]
    tokens, logits = answer(zoo, inputs, reducer, Spin(**SETTINGS, score=score))
    with torch.no_grad(), lmmhooks.wrap(zoo.model, reducer):
        zoo.model(**inputs)
        index = find_runtime(zoo.model).last.stages[0].index
    left = ids.clone()
    for row in range(2):
        for j in range(ids.shape[1]):
            if ids[row, j] == IMAGE and j not in index[row].tolist():
                left[row, j] = 0
    reference = spin(IMAGE, left, **SETTINGS, layers=range(4), mass=score == "mass")
    read = reference.get("scores", lambda layer, values, row, hidden: values)

    def scores(layer, values, row, hidden):
        values = read(layer, values, row, hidden)
        values[:, :, : ids.shape[1]][:, :, left[row] != ids[row]] = -1e30
        return values

    with dense_attention(zoo.model, **{**reference, "scores": scores}):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -3:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@SCORES
def test_beside_contrastive_decoding_each_reading_ranks_its_heads(score):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = answer(zoo, inputs, "vcd(beta=0.0)")[1]
    tokens, logits = answer(zoo, inputs, Spin(**SETTINGS, score=score), "vcd(beta=0.0)")
    assert torch.isfinite(logits).all()
    assert (logits - plain).abs().max() > 1e-2
    for row in range(2):
        one, one_logits = answer(zoo, zoo.row(inputs, row), Spin(**SETTINGS, score=score), "vcd(beta=0.0)")
        assert torch.equal(tokens[row : row + 1], one)
        # Four readings in one batch against two: the same sums in another order, doubled by the contrast.
        torch.testing.assert_close(logits[row : row + 1], one_logits, atol=5e-5, rtol=0)


def test_presets_name_the_published_settings():
    assert lmmhooks.methods.resolve("spin(preset='chair')") == Spin()
    assert lmmhooks.methods.resolve("spin(preset='pope')").spec() == "spin(keep_ratio=0.8, gain=0.1)"
    assert lmmhooks.methods.resolve("spin(preset='mmhal')").spec() == "spin(keep_ratio=0.9, gain=0.0, end=20)"
    assert lmmhooks.methods.resolve("spin(preset='qwen')").spec() == "spin(keep_ratio=0.7, end=20)"


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"keep_ratio": 1.2}, r"keep_ratio must be in \[0, 1\]"),
        ({"gain": -0.1}, r"gain must be in \[0, 1\]"),
        ({"start": -1}, "start must be at least 0"),
        ({"start": 3, "end": 3}, "end must be above start=3 or None"),
        ({"score": "softmax"}, "score must be 'logits' or 'mass'"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, allowed):
    with pytest.raises(lmmhooks.MethodError, match=allowed):
        lmmhooks.method("spin", **settings)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"preset": "mmhal"}, "end=20 is not allowed; end must be at most 4, the layers of this model"),
        ({"start": 4}, "start=4 is not allowed; start must be below 4"),
    ],
)
def test_layers_the_model_has_not_got_are_refused_at_wrap(settings, allowed):
    zoo = build("llava")
    with pytest.raises(lmmhooks.MethodError, match=allowed):
        lmmhooks.wrap(zoo.model, lmmhooks.method("spin", **settings))
