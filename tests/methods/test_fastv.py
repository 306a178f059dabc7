"""FastV against explicit attention matrices, one row and one token at a time."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.fastv import FastV
from tests.engines.reducers import visual_groups
from tests.reference.reduction import best, fastv, keep_only, reduced_logits
from tests.zoo import FAMILIES, build

# float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5
KWARGS = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, per_image):
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, FastV(keep=3, per_image=per_image)):
        with torch.no_grad():
            prefill = zoo.model(**inputs).logits
        out = zoo.model.generate(**inputs, **KWARGS)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        groups = visual_groups(eager.model, inputs, row)
        num_keep = 3 if per_image else 3 * len(groups)
        cuts = {2: (fastv(groups, num_keep, per_image=per_image), False)}
        expected = reduced_logits(eager.model, inputs, row, cuts)
        valid = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(prefill[row, valid], expected, atol=TOLERANCE, rtol=0)
        steps = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-3:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], steps, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("block", [512, 4])
@pytest.mark.parametrize("rows", ["after_image", "all"])
def test_other_rows_may_be_averaged(rows, block, monkeypatch):
    # Rows of long prompts are read in blocks.
    monkeypatch.setattr(editing, "ROW_BLOCK", block)
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, FastV(keep=5, rows=rows)):
        logits = zoo.model(**inputs).logits
    for row in range(2):
        (group,) = visual_groups(eager.model, inputs, row)

        def choose(alive, weights, prompt, group=group):
            read = [i for i in range(prompt) if rows == "all" or i > group[-1]]
            scores = {n: sum(float(weights[:, i, n].mean()) for i in read) / len(read) for n in group}
            return keep_only(set(group), best(scores, 5))(alive, weights, prompt)

        valid = inputs["attention_mask"][row].bool()
        expected = reduced_logits(eager.model, inputs, row, {2: (choose, False)})
        torch.testing.assert_close(logits[row, valid], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_gives_the_same_answer_as_pruning(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    logits, lengths = [], []
    for mode in ("prune", "mask"):
        with lmmhooks.wrap(zoo.model, FastV(keep=0.3, mode=mode)):
            out = zoo.model.generate(**inputs, **KWARGS)
        logits.append(torch.stack(out.logits))
        lengths.append([layer.get_seq_length() for layer in out.past_key_values.layers])
    torch.testing.assert_close(logits[0], logits[1], atol=TOLERANCE, rtol=0)
    assert lengths[0][:2] == lengths[1][:2]
    assert max(lengths[0][2:]) < min(lengths[1][2:])


def test_the_first_generated_token_is_at_the_position_after_the_full_prompt():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    seen = []
    layer = zoo.model.model.language_model.layers[3]
    with lmmhooks.wrap(zoo.model, FastV(keep=2)):
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
        )
        zoo.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        hook.remove()
    length = inputs["input_ids"].shape[1]
    assert seen[0][-1] == length - 1
    assert seen[1:] == [[length], [length + 1]]


def test_shares_round_half_to_even_and_counts_are_per_image():
    method = FastV()
    assert [method.count(0.5, n) for n in (5, 7, 576, 9)] == [2, 4, 288, 4]
    assert [FastV(keep=k).count(k, 576) for k in (0.75, 0.5, 0.25, 0.125)] == [432, 288, 144, 72]


def test_a_layer_past_the_last_does_nothing():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, FastV(keep=1, layer=4)):
            assert torch.equal(zoo.model(**inputs).logits, plain)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newline_tokens_are_ranked_with_the_others(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, FastV(keep=0.5)):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    before, after = state.stages[0].layout.spans[0].tokens, state.stages[1].layout.spans[0].tokens
    newlines = int((before.crop < 0).sum())
    assert newlines > 0
    assert len(after) == round(len(before) * 0.5), "they count among what a share is of"
    with torch.no_grad(), lmmhooks.wrap(zoo.model, FastV(keep=0.5, newline="drop")):
        zoo.model(**inputs)
        after = find_runtime(zoo.model).last.stages[1].layout.spans[0].tokens
    assert len(after) == round((len(before) - newlines) * 0.5)
    assert (after.crop >= 0).all()


def test_it_follows_a_cut_before_the_decoder():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, "fastervlm(keep=8)", "fastv(keep=0.25)") as patch:
        zoo.model.generate(**inputs, max_new_tokens=2)
        assert [layer.visual_kept for layer in patch.stats.layers] == [(16, 8), (16, 8), (4, 2), (4, 2)]


@pytest.mark.parametrize(
    "settings", [{"keep": None}, {"keep": 0.0}, {"layer": 0}, {"rows": "first"}, {"mode": "hide"}, {"newline": "no"}]
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("fastv", **settings)
