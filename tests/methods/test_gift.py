"""Gaze-shift guided fusion against its naive rendering."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.family import resolve
from lmmhooks.methods.attention.gift import Gift, enhance, saliency_map
from tests.reference.attention import dense_attention, full_logits
from tests.reference.gift import gift
from tests.zoo import FAMILIES, IMAGE, build

# float32 through four layers in another summation order; weights are multiplied by up to e^3 before they are
# renormalised. Largest difference seen is 4e-6.
TOLERANCE = 1e-5
SETTINGS = {"alpha": 3.0, "question_skip": (1, 1)}
ON_THE_WAY = {"saliency_layers": (1,), "enhancement_layers": (2, 3)}
BEFOREHAND = {"saliency_layers": (1, 2), "enhancement_layers": (1, 3)}


def generate(zoo, inputs, *methods, steps=3):
    """New tokens and their logits ``[B, steps, vocabulary]``."""
    with lmmhooks.wrap(zoo.model, *methods):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def expected_logits(zoo, inputs, answer, settings):
    edit = gift(
        zoo.model,
        inputs,
        IMAGE,
        settings["saliency_layers"],
        settings["enhancement_layers"],
        settings["alpha"],
        settings["question_skip"],
    )
    with dense_attention(zoo.model, edit):
        return full_logits(zoo.model, inputs, answer[:, :-1])[:, -answer.shape[1] :]


@pytest.mark.parametrize("layers", [ON_THE_WAY, BEFOREHAND], ids=["on the way", "beforehand"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, layers):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    settings = SETTINGS | layers
    answer, logits = generate(zoo, inputs, Gift(**settings))
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -answer.shape[1] :]
    expected = expected_logits(zoo, inputs, answer, settings)
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-2, "an edit that changes nothing proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_several_images_and_none_in_one_batch():
    zoo = build("llava")
    inputs = zoo.inputs(batch=3, images=[2, 0, 1], text=[6, 9, 8])
    settings = SETTINGS | ON_THE_WAY
    answer, logits = generate(zoo, inputs, Gift(**settings))
    torch.testing.assert_close(logits, expected_logits(zoo, inputs, answer, settings), atol=TOLERANCE, rtol=0)


def test_rows_without_an_image_or_a_question_are_bit_identical():
    zoo = build("llava")
    inputs = zoo.inputs(batch=3, images=[0, 1, 1], text=[9, 2, 8])
    # Attention of every layer goes through the same explicit row in both cases.
    _, plain = generate(zoo, inputs, Control())
    _, logits = generate(zoo, inputs, Gift(**SETTINGS | ON_THE_WAY))
    assert torch.equal(logits[:2], plain[:2])
    assert not torch.equal(logits[2], plain[2])


class Control(Gift):
    """The same rows recomputed, nothing raised."""

    def edit_weights(self, weights, context):
        return weights

    def bind(self, family):
        return Control(**SETTINGS | ON_THE_WAY)


def test_weights_read_in_blocks_give_the_same_map(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = Gift(**SETTINGS | ON_THE_WAY)
    _, whole = generate(zoo, inputs, method)
    monkeypatch.setattr(editing, "ROW_BLOCK", 3)
    torch.testing.assert_close(generate(zoo, inputs, method)[1], whole, atol=TOLERANCE, rtol=0)


def random_rows(*shape, seed=0):
    return torch.softmax(2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def places(length, *wanted):
    found = torch.zeros(len(wanted), length, dtype=torch.bool)
    for row, columns in enumerate(wanted):
        found[row, list(columns)] = True
    return found


def test_map_spans_one_to_e_to_the_alpha_and_ignores_scale():
    visual = places(20, range(2, 12), range(5, 15))
    rises = torch.rand(2, 2, 5, 20, generator=torch.Generator().manual_seed(0)) * visual[:, None]
    found = saliency_map(rises, visual, alpha=2.0)
    for row in range(2):
        torch.testing.assert_close(found[row, visual[row]].amin(), torch.tensor(1.0))
        torch.testing.assert_close(found[row, visual[row]].amax(), torch.tensor(math.e**2))
    assert (found[~visual] == 1).all()
    torch.testing.assert_close(saliency_map(rises * 7, visual, 2.0), found)


def test_map_keeps_the_half_of_the_heads_that_rise_most():
    visual = places(6, range(6))
    rises = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    rises[:, :, [1, 3]] += 5
    kept = rises[0, 0, [1, 3]].mean(dim=0)
    expected = torch.exp((kept - kept.min()) / (kept.max() - kept.min()))
    torch.testing.assert_close(saliency_map(rises, visual, 1.0)[0], expected)


def test_an_outlier_is_clipped_at_three_standard_deviations():
    visual = places(101, range(101))
    rises = torch.zeros(1, 1, 2, 101)
    rises[..., :50], rises[..., 100] = 1.0, 1000.0
    values = rises[0, 0, 0]
    top = values.mean() + 3 * values.std()
    expected = torch.exp(1.0 / top)
    torch.testing.assert_close(saliency_map(rises, visual, 1.0)[0, 0], expected)


@pytest.mark.parametrize("visual", [places(6, range(6)), places(6, [2]), places(6, [])], ids=["all", "one", "none"])
def test_equal_increments_give_ones(visual):
    rises = 0.3 * visual.float().expand(1, 4, 6)[:, None]
    assert torch.equal(saliency_map(rises, visual, 5.0), torch.ones(1, 6))


@pytest.fixture
def rows():
    weights = random_rows(2, 5, 1, 20)
    visual, question = places(20, range(2, 10), range(4, 12)), places(20, range(11, 15), range(13, 18))
    saliency = torch.where(visual, 1 + 4 * torch.rand(2, 20, generator=torch.Generator().manual_seed(1)), 1.0)
    return weights, saliency, visual, question


def test_rows_sum_to_one_and_half_of_the_heads_follow_the_map(rows):
    weights, saliency, visual, question = rows
    out = enhance(weights.clone(), saliency, visual, question)
    torch.testing.assert_close(out.sum(dim=-1), torch.ones(2, 5, 1))
    # Ratios inside the image change by the map in floor(5 / 2) heads and nowhere else.
    for row in range(2):
        pixel = visual[row].nonzero().flatten()
        ratio = out[row, :, 0, pixel] / weights[row, :, 0, pixel]
        steady = (ratio / ratio[:, :1] - 1).abs().amax(dim=1) < 1e-4
        assert int((~steady).sum()) == 2
        follows = ratio[~steady] / ratio[~steady][:, :1]
        torch.testing.assert_close(follows, (saliency[row, pixel] / saliency[row, pixel[0]]).expand(2, -1))


def test_multiplied_weights_equal_biased_logits(rows):
    weights, saliency, visual, question = rows
    logits = weights.log() + 3.0
    bias = torch.zeros_like(weights)
    for row in range(2):
        looking = (weights[row, :, 0] * visual[row]).sum(-1).topk(2).indices
        asking = (weights[row, :, 0] * question[row]).sum(-1).topk(2).indices
        before = weights[row, looking, 0][:, visual[row]].sum()
        after = (weights[row, looking, 0] * saliency[row])[:, visual[row]].sum()
        bias[row, looking, 0] += saliency[row].log()
        bias[row, asking, 0] += (after / before).log() * question[row]
    expected = torch.softmax(logits + bias, dim=-1)
    # The two forms round differently; weights are at most 1.
    torch.testing.assert_close(enhance(weights, saliency, visual, question), expected, atol=1e-6, rtol=1e-5)


def test_a_map_of_ones_changes_no_bit(rows):
    weights, saliency, visual, question = rows
    saliency[0] = 1
    out = enhance(weights.clone(), saliency, visual, question)
    assert torch.equal(out[0], weights[0])
    assert not torch.equal(out[1], weights[1])


def test_strength_zero_attaches_nothing():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, "gift(alpha=0)") as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_prompts_in_a_row_do_not_share_a_map():
    zoo = build("qwen3_vl")
    method = Gift(**SETTINGS | ON_THE_WAY)
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, method):
            zoo.model.generate(**first, max_new_tokens=3)
            after_another = zoo.model(**second).logits
        with lmmhooks.wrap(zoo.model, method):
            fresh = zoo.model(**second).logits
    assert torch.equal(after_another, fresh)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_map_of_the_whole_image_serves_the_tokens_that_a_later_cut_keeps(family):
    """A cut at layer 2 keeps positions, so that it equals hiding the keys that leave."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    settings = SETTINGS | ON_THE_WAY
    with lmmhooks.wrap(zoo.model, Gift(**settings), "fastv(keep=5, layer=2)") as patch, torch.no_grad():
        logits = zoo.model(**inputs).logits[:, -1]
        index = patch._runtime.last_state.stages[-1].index
    gone = {row: set(range(inputs["input_ids"].shape[1])) - set(index[row].tolist()) for row in range(2)}

    def hide(layer, scores, row, hidden):
        if layer >= 2:
            scores[:, :, sorted(gone[row])] = -1e9
        return scores

    edit = gift(zoo.model, inputs, IMAGE, (1,), (2, 3), 3.0, (1, 1), gone)
    with dense_attention(zoo.model, edit, scores=hide):
        expected = full_logits(zoo.model, inputs)[:, -1]
    with dense_attention(zoo.model, scores=hide):
        without = full_logits(zoo.model, inputs)[:, -1]
    assert (expected - without).abs().amax(dim=1).min() > 1e-2
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("reducer", ["fastervlm(keep=5)", "random(keep=4)"])
def test_a_map_knows_only_tokens_that_were_there(reducer):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = Gift(**SETTINGS | ON_THE_WAY)
    with lmmhooks.wrap(zoo.model, method, reducer) as patch:
        zoo.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        state = patch._runtime.last_state
        saliency = state.memory(patch.methods[0])["saliency"]
        index = state.stages[-1].index
    kept = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row in range(2):
        kept[row, index[row][index[row] >= 0]] = True
    image = inputs["input_ids"] == IMAGE
    assert saliency.shape == image.shape
    assert (saliency[~(image & kept)] == 1).all()
    for row in range(2):
        among = saliency[row, image[row] & kept[row]]
        torch.testing.assert_close(torch.stack([among.amin(), among.amax()]), torch.tensor([1.0, math.exp(3.0)]))


@pytest.mark.parametrize("layers", [ON_THE_WAY, BEFOREHAND], ids=["on the way", "beforehand"])
def test_runs_beside_a_decoding_method(layers):
    zoo = build("qwen2_5_vl")
    _, logits = generate(zoo, zoo.inputs(batch=2), Gift(**SETTINGS | layers), "vcd(beta=0.0)")
    assert torch.isfinite(logits).all()


def test_published_settings_are_those_of_the_released_code():
    def family(name, width, depth):
        return SimpleNamespace(name=name, hidden_size=width, num_layers=depth)

    large = Gift.defaults_for(family("llava", 5120, 40))
    assert large == {"alpha": 5.0, "saliency_layers": (10,), "enhancement_layers": (14, 15, 16, 17, 18, 19, 20)}
    assert Gift.defaults_for(family("qwen2_vl", 3584, 28))["alpha"] == 4.0
    small = family("llava", 4096, 32)
    assert Gift().bind(small).settings() == Gift(**Gift.defaults_for(small)).settings()
    assert Gift.defaults_for(family("llava", 64, 4)) == {}


def test_layers_of_other_models_scale_with_depth():
    for depth in (2, 3, 8, 24, 28, 36):
        bound = Gift().bind(SimpleNamespace(num_layers=depth))
        assert max(bound.saliency_layers) < min(bound.enhancement_layers)
        assert max(bound.enhancement_layers) < depth


def test_published_offsets_hold_without_a_tokenizer():
    family = resolve(build("llava").model)
    question, counted = Gift().find_question(list(range(20)), family, None)
    assert question == counted == list(range(2, 15))
    question, _ = Gift(question_skip=(1, 0)).find_question(list(range(3)), family, None)
    assert question == [1, 2]
    assert Gift().find_question([9, 9, 9], family, None) == ([], [])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"alpha": -1}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"words": "nouns"}, "words"),
        ({"question_skip": (0, 0)}, "question_skip"),
        ({"question_skip": (1,)}, "question_skip"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=f"{name}=.*must be"):
        Gift(**settings)


@pytest.mark.parametrize(
    "settings", [{"saliency_layers": (4,)}, {"enhancement_layers": (2, 9)}, {"saliency_layers": ()}]
)
def test_layers_outside_the_model_are_refused_at_wrap(settings):
    with pytest.raises(lmmhooks.MethodError, match="layers of this model, 0 to 3"):
        lmmhooks.wrap(build("llava").model, Gift(**settings))


def test_a_missing_tagger_is_refused_at_wrap(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(lmmhooks.MethodError, match="pip install spacy"):
        lmmhooks.wrap(build("llava").model, "gift(words='spacy')")
