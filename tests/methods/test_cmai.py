"""Cross-modality attention inhibition against its naive rendering."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.methods.attention.cmai import Cmai, focus, least_focused
from tests.reference.attention import dense_attention, full_logits
from tests.reference.cmai import cmai
from tests.zoo import FAMILIES, IMAGE, build

# float32 through a few layers in another summation order; where the two disagreed about which tokens are hidden, logits
# would differ by far more. Largest difference seen is 3e-6.
TOLERANCE = 1e-5


def generate(zoo, inputs, *methods, steps=3):
    """New tokens and their logits ``[B, steps, vocabulary]``."""
    with lmmhooks.wrap(zoo.model, *methods):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def expected_logits(zoo, inputs, answer, **settings):
    edit = cmai(inputs["input_ids"], IMAGE, **{"ratio": 0.5, "focus_layer": 1} | settings)
    with dense_attention(zoo.model, scores=edit):
        return full_logits(zoo.model, inputs, answer[:, :-1])[:, -answer.shape[1] :]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, per_layer):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    answer, logits = generate(zoo, inputs, Cmai(focus_layer=1, per_layer=per_layer))
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -answer.shape[1] :]
    expected = expected_logits(zoo, inputs, answer, per_layer=per_layer)
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-2, "an edit that changes nothing proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_several_images_and_none_in_one_batch():
    zoo = build("llava")
    inputs = zoo.inputs(batch=3, images=[2, 0, 1])
    answer, logits = generate(zoo, inputs, Cmai(focus_layer=1))
    torch.testing.assert_close(logits, expected_logits(zoo, inputs, answer), atol=TOLERANCE, rtol=0)


def test_rows_in_blocks_know_the_rows_of_earlier_blocks(monkeypatch):
    monkeypatch.setattr(editing, "ROW_BLOCK", 3)
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[1, 2])
    answer, logits = generate(zoo, inputs, Cmai(focus_layer=1, per_layer=True))
    torch.testing.assert_close(logits, expected_logits(zoo, inputs, answer, per_layer=True), atol=TOLERANCE, rtol=0)


def test_beams_keep_the_focus_of_their_own_answer():
    """The score of a beam is the sum of log-probabilities that the naive rendering gives its tokens."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    length = 6
    with lmmhooks.wrap(zoo.model, Cmai(focus_layer=1)):
        out = zoo.model.generate(
            **inputs,
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            max_new_tokens=length,
            min_new_tokens=length,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    answers = out.sequences[:, inputs["input_ids"].shape[1] :]
    for number, answer in enumerate(answers[:, None]):
        one = zoo.row(inputs, number // 4)
        logits = expected_logits(zoo, one, answer)
        # min_new_tokens forbids the end of the answer before its time, after which scores are not normalised again.
        log_probabilities = torch.log_softmax(logits, dim=-1)
        total = log_probabilities.gather(2, answer[..., None]).sum()
        torch.testing.assert_close(out.sequences_scores[number], total, atol=5e-5, rtol=0)


def test_tokens_read_several_at_once_are_those_read_one_by_one():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = Cmai(focus_layer=1)
    answer, logits = generate(zoo, inputs, method, steps=4)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = zoo.model(**inputs, position_ids=positions[:, :-3], use_cache=True).past_key_values
        together = zoo.model(
            input_ids=answer[:, :3], attention_mask=mask, position_ids=positions[:, -3:], past_key_values=cache
        )
    torch.testing.assert_close(together.logits, logits[:, 1:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_image_tokens_keep_their_names_when_a_later_layer_cuts_others(family):
    """A cut keeps positions, so that it equals hiding the keys that leave from its layer on."""
    zoo = build(family, layers=5)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Cmai(focus_layer=1), "fastv(keep=3, layer=3)") as patch, torch.no_grad():
        logits = zoo.model(**inputs).logits[:, -1]
        index = patch._runtime.last_state.stages[-1].index
    everything = set(range(inputs["input_ids"].shape[1]))
    gone = {layer: {row: everything - set(index[row].tolist()) for row in range(2)} for layer in (3, 4)}
    with dense_attention(zoo.model, scores=cmai(inputs["input_ids"], IMAGE, 0.5, 1, gone=gone)):
        expected = full_logits(zoo.model, inputs)[:, -1]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("others", [("fastervlm(keep=5)",), ("random(keep=4)",), ("vcd(beta=0.0)",)], ids=str)
def test_runs_beside_other_kinds(others):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    answer, logits = generate(zoo, inputs, Cmai(focus_layer=1), *others)
    assert torch.isfinite(logits).all()
    one, one_logits = generate(zoo, zoo.row(inputs, 1), Cmai(focus_layer=1), *others)
    assert torch.equal(answer[1:], one)
    torch.testing.assert_close(logits[1:], one_logits, atol=5e-5, rtol=0)


class Seen(Cmai):
    """Collects weights per layer, as the model uses them."""

    def edit_weights(self, weights, context):
        context.memory.setdefault("collected", {})[context.layer] = (weights, context.rows, context.layout)
        return weights

    def bind(self, family):
        return Seen(focus_layer=1)


def test_inhibited_pairs_weigh_nothing_and_ratios_between_text_stay():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Seen(focus_layer=1)) as patch, torch.no_grad():
        zoo.model(**inputs)
        memory = patch._runtime.last_state.memory(patch.methods[0])
    weights, rows, layout = memory["collected"][2]
    real = layout.after_image.gather(1, rows)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    on_image = weights.masked_fill(~layout.visual[:, None, None], 1)
    zeros = (on_image == 0).sum(dim=-1)
    # 8 of the 16 image tokens, the same for all heads.
    assert (zeros == torch.where(real, 8, 0)[:, None]).all()
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Reader()) as patch:
        zoo.model(**inputs)
        plain, _, _ = patch._runtime.last_state.memory(patch.methods[0])["collected"][2]
    # Layer 2 is the first that is inhibited, so its inputs are those of the plain model.
    text = (layout.valid & ~layout.visual)[:, None, None] & (plain > 0)
    ratio = torch.where(text, weights / plain.clamp_min(1e-30), torch.nan)
    spread = ratio / ratio.nanmean(dim=-1, keepdim=True) - 1
    assert spread[text].abs().max() < 1e-4


class Reader(Seen):
    """Hides nothing."""

    def edit_scores(self, scores, context):
        return scores

    def bind(self, family):
        return Reader(focus_layer=1)


def test_focus_follows_the_text_a_row_attends_to():
    to_image = torch.tensor([[[0.1, 0.2]]])
    to_text = torch.tensor([[[0.5, 0.25]]])
    earlier = torch.tensor([[[0.4, 0.0], [0.0, 0.8]]])
    torch.testing.assert_close(focus(to_image, to_text, earlier), torch.tensor([[[0.3, 0.4]]]))


def test_the_lowest_go_and_one_is_left():
    scores = torch.tensor([[[0.3, 0.1, 0.0, 0.2, 0.5]]])
    seen = torch.tensor([[[True, True, False, True, True]]])
    assert least_focused(scores, seen, 0.5).tolist() == [[[False, True, False, True, False]]]
    assert least_focused(scores, seen, 0.49).tolist() == [[[False, True, False, False, False]]]
    assert least_focused(scores, seen, 1.0).tolist() == [[[True, True, False, True, False]]]
    assert not least_focused(scores, torch.zeros_like(seen), 1.0).any()


def test_strength_zero_attaches_nothing():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, "cmai(inhibit_ratio=0.0)") as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_prompts_in_a_row_do_not_share_a_focus():
    zoo = build("qwen3_vl")
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, Cmai(focus_layer=1)):
            zoo.model.generate(**first, max_new_tokens=3)
            after_another = zoo.model(**second).logits
        with lmmhooks.wrap(zoo.model, Cmai(focus_layer=1)):
            fresh = zoo.model(**second).logits
    assert torch.equal(after_another, fresh)


@pytest.mark.parametrize("settings", [{"inhibit_ratio": 1.5}, {"inhibit_ratio": -0.1}, {"focus_layer": -1}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        Cmai(**settings)


def test_a_layer_must_be_left_to_inhibit():
    model = build("llava").model
    with pytest.raises(lmmhooks.MethodError, match="focus_layer=3 is not allowed; focus_layer must be at most 2"):
        lmmhooks.wrap(model, "cmai(focus_layer=3)")
    lmmhooks.wrap(model, "cmai(focus_layer=3, per_layer=True)").remove()
