"""The compression of keys and values against rows of the answer that attend to Python lists."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.engines.caching import best_entries, right_aligned
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.engines.state import select_rows
from lmmhooks.layout import Layout
from lmmhooks.methods.reduction.fastv import FastV
from lmmhooks.methods.reduction.look_m import LookM
from lmmhooks.methods.reduction.vl_cache import VLCache
from tests.engines.pressers import (
    STEPS,
    TOLERANCE,
    ByValueNorm,
    ByValueNormLater,
    generate,
    naive_by_value_norm,
)
from tests.reference.caching import step_logits
from tests.zoo import FAMILIES, build


def check(zoo, inputs, method, rows=None):
    """Logits of the answer against the naive rendering, every row; entries held by every layer."""
    with lmmhooks.wrap(zoo.model, method):
        answer, logits, lengths = generate(zoo, inputs)
    for row in range(len(answer)) if rows is None else rows:
        one = zoo.row(inputs, row)
        expected = step_logits(zoo.model, one, naive_by_value_norm(method.shares), answer[row])
        torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=0)
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    assert lengths == [int(share * longest) + STEPS - 1 for share in method.shares]


@pytest.mark.parametrize("method", [ByValueNorm(), ByValueNormLater()], ids=lambda method: method.id)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_attention_over_lists(family, method):
    zoo = build(family)
    check(zoo, zoo.inputs(batch=2, images=[2, 1]), method)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_rows_of_different_length_keep_different_numbers(attn, padding):
    zoo = build("llava", attn=attn)
    inputs = zoo.inputs(batch=3, text=[4, 19, 11], padding=padding)
    with lmmhooks.wrap(zoo.model, ByValueNorm()), torch.no_grad():
        cache = zoo.model(**inputs).past_key_values
        pressed = find_runtime(zoo.model).last.pressed
    sizes = inputs["attention_mask"].sum(dim=1)
    for layer, share in enumerate(ByValueNorm().shares):
        expected = [int(share * int(size)) for size in sizes]
        assert pressed[layer].mask.sum(dim=1).tolist() == expected
        assert cache.layers[layer].keys.shape[2] == max(expected)
        # Fillers stand before what a row holds.
        assert (pressed[layer].mask.int().diff(dim=1) >= 0).all()
    if padding == "left":  # generate() wants the last prompt token in the last column
        check(zoo, inputs, ByValueNorm())


def test_rows_without_an_image_keep_everything():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2, images=[1, 0])
    _, plain, _ = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, ByValueNorm()):
        _, logits, lengths = generate(zoo, inputs)
    # Its neighbour no longer pads it, which changes the order of summation and nothing else.
    torch.testing.assert_close(logits[1], plain[1], atol=TOLERANCE, rtol=0)
    assert (logits[0, 1:] - plain[0, 1:]).abs().max() > 1e-2
    assert min(lengths) >= int(inputs["attention_mask"][1].sum())


def test_a_text_only_prompt_is_bit_identical():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=0, text=[9, 4])
    _, plain, lengths = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, ByValueNorm()):
        _, logits, kept = generate(zoo, inputs)
        assert not find_runtime(zoo.model).last.pressed
    assert torch.equal(logits, plain)
    assert kept == lengths


def test_columns_are_summed_over_blocks_of_rows(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = LookM(hh_ratio=0.6, merge="none")
    answers = []
    for block in (512, 4):
        monkeypatch.setattr(editing, "ROW_BLOCK", block)
        with lmmhooks.wrap(zoo.model, method):
            answers.append(generate(zoo, inputs)[1])
    torch.testing.assert_close(*answers, atol=TOLERANCE, rtol=0)


def test_positions_go_on_from_the_full_prompt():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    seen = []
    layer = zoo.model.model.language_model.layers[0]
    with lmmhooks.wrap(zoo.model, ByValueNorm()):
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
        )
        generate(zoo, inputs)
        hook.remove()
    length = inputs["input_ids"].shape[1]
    assert seen[1:] == [[length + step] for step in range(STEPS - 1)]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_text_may_continue_a_cache_without_positions(family):
    """A plain loop over forward: the model itself would count positions from the shortened cache."""
    zoo = build(family)
    inputs = zoo.inputs(batch=1)
    more = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByValueNorm()):
        cache = DynamicCache(config=zoo.model.config.get_text_config())
        zoo.model(**inputs, past_key_values=cache)
        several = zoo.model(input_ids=more[:, :2], past_key_values=cache).logits
        one = zoo.model(input_ids=more[:, 2:3], past_key_values=cache).logits
    expected = step_logits(zoo.model, inputs, naive_by_value_norm(ByValueNorm().shares), more[0])[1:]
    torch.testing.assert_close(torch.cat([several, one], dim=1)[0], expected, atol=TOLERANCE, rtol=0)


def test_tokens_that_followed_the_prompt_may_be_taken_back():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByValueNorm()):
        caches = [zoo.model(**inputs).past_key_values for _ in range(2)]
        zoo.model(input_ids=torch.tensor([[20, 30, 31]]), past_key_values=caches[0])
        caches[0].crop(-2)
        zoo.model(input_ids=torch.tensor([[20]]), past_key_values=caches[1])
        again, once = (zoo.model(input_ids=torch.tensor([[21]]), past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(again, once, atol=TOLERANCE, rtol=0)


def test_prompts_may_interleave():
    zoo = build("llava")
    prompts = [zoo.inputs(batch=1, seed=seed, text=4 + 5 * seed) for seed in (0, 1)]
    token = torch.tensor([[30]])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByValueNorm()):
        alone = []
        for prompt in prompts:
            cache = DynamicCache()
            zoo.model(**prompt, past_key_values=cache)
            alone.append(zoo.model(input_ids=token, past_key_values=cache).logits)
        caches = [DynamicCache(), DynamicCache()]
        for prompt, cache in zip(prompts, caches, strict=True):
            zoo.model(**prompt, past_key_values=cache)
        together = [zoo.model(input_ids=token, past_key_values=cache).logits for cache in caches]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_forward_without_cache_has_nothing_to_compress():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "use_cache": False}
    plain = zoo.model.generate(**inputs, **settings)
    with lmmhooks.wrap(zoo.model, ByValueNorm()):
        assert torch.equal(zoo.model.generate(**inputs, **settings), plain)


@pytest.mark.parametrize("method", [LookM(hh_ratio=0.5), VLCache(alpha=0.3)], ids=lambda method: method.id)
def test_nothing_of_the_prompt_is_held_after_it_was_read(method):
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        cache = zoo.model(**inputs).past_key_values
        state = find_runtime(zoo.model).last
        assert all(stage.scratch == {} for stage in state.stages)
        held = [value for memory in state._memory.values() for value in memory.values()]
        assert not any(value for value in held), "tallies and entries go once they were used"
        length = inputs["input_ids"].shape[1]
        gc.collect()
        full = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (1, 2, length, 16)]
    assert not full, "the full keys and values are let go"
    assert cache.get_seq_length() < length


def test_half_precision_runs():
    zoo = build("qwen3_vl", dtype=torch.bfloat16)
    with lmmhooks.wrap(zoo.model, LookM(hh_ratio=0.5)):
        _, logits, _ = generate(zoo, zoo.inputs(batch=2))
    assert torch.isfinite(logits).all()


# -- together with other methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LookM(hh_ratio=0.5), ByValueNorm(), VLCache(alpha=0.4)], ids=lambda m: m.id)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_it_follows_a_cut_whose_tokens_it_never_sees(family, method):
    """Tokens that left and tokens that are only hidden are equally gone for it; shares are of what a layer holds."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    found = {}
    for mode in ("prune", "mask"):
        with lmmhooks.wrap(zoo.model, FastV(keep=4, mode=mode), method):
            found[mode] = generate(zoo, inputs)
    torch.testing.assert_close(found["prune"][1], found["mask"][1], atol=TOLERANCE, rtol=0)
    assert found["prune"][2] == found["mask"][2]
    if isinstance(method, ByValueNorm):
        before = int(inputs["attention_mask"].sum(dim=1).max())
        visual = (inputs["input_ids"] == zoo.model.config.image_token_id).sum(dim=1)
        after = int((inputs["attention_mask"].sum(dim=1) - visual + torch.tensor([8, 4])).max())
        sizes = [num - (STEPS - 1) for num in found["prune"][2]]
        assert sizes == [
            int(share * num) for share, num in zip(method.shares, (before, before, after, after), strict=True)
        ]


def test_it_follows_a_cut_before_the_decoder():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, "uniform-grid(keep=4)", ByValueNorm()) as patch:
        tokens, logits, lengths = generate(zoo, inputs)
        assert [layer.visual_kept for layer in patch.stats.layers] == [(4, 4)] * 4
        for row in range(2):
            alone = generate(zoo, zoo.row(inputs, row))
            torch.testing.assert_close(logits[row], alone[1][0], atol=TOLERANCE, rtol=0)
            assert torch.equal(tokens[row], alone[0][0])
    longest = int(inputs["attention_mask"].sum(dim=1).max()) - 12
    assert lengths == [int(share * longest) + STEPS - 1 for share in ByValueNorm().shares]


@pytest.mark.parametrize("decoding", ["vcd(beta=0.0)", "pai-guidance(gamma=1.5, beta=0.0)"])
def test_every_branch_is_compressed_on_its_own(decoding):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, decoding):
        _, alone, _ = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, decoding, LookM(hh_ratio=0.6)):
        tokens, logits, lengths = generate(zoo, inputs)
        for row in range(2):
            one_tokens, one_logits, _ = generate(zoo, zoo.row(inputs, row))
            torch.testing.assert_close(logits[row], one_logits[0], atol=5 * TOLERANCE, rtol=0)
            assert torch.equal(tokens[row], one_tokens[0])
    # A short branch is read by itself where nothing else acts, so that sums are taken in another order.
    torch.testing.assert_close(logits[:, 0], alone[:, 0], atol=TOLERANCE, rtol=0)
    assert (logits[:, 1] - alone[:, 1]).abs().max() > 1e-2
    assert len(lengths) == 4


def test_beams_equal_beams_of_single_rows():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    kwargs = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with lmmhooks.wrap(zoo.model, ByValueNorm()):
        together = zoo.model.generate(**inputs, **kwargs)[:, -4:]
        alone = [zoo.model.generate(**zoo.row(inputs, row), **kwargs)[:, -4:] for row in range(2)]
    assert torch.equal(together, torch.cat(alone))


def test_attention_edits_of_the_prompt_alone_may_stand_beside_it():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, "adaptvis(low=0.5, high=2.0, threshold=0.1)"):
        _, alone, _ = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, "adaptvis(low=0.5, high=2.0, threshold=0.1)", LookM(hh_ratio=0.5)):
        _, logits, _ = generate(zoo, inputs)
    # Edited rows are computed beside those that are read, in products of another shape.
    torch.testing.assert_close(logits[:, 0], alone[:, 0], atol=TOLERANCE, rtol=0)
    assert (logits[:, 1] - alone[:, 1]).abs().max() > 1e-2


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["var(sink_dims='any')", "pai"])
def test_edits_of_the_attention_of_answers_are_refused(other):
    zoo = build("llava")
    with pytest.raises(lmmhooks.MethodError, match="different ones to every head"):
        lmmhooks.wrap(zoo.model, other, "look-m")
    assert find_runtime(zoo.model) is None


def test_two_compressions_are_refused():
    with pytest.raises(lmmhooks.MethodError, match="both compress"):
        lmmhooks.wrap(build("llava").model, "vl-cache", "look-m")


def test_sliding_windows_are_refused_at_wrap():
    zoo = build(
        "internvl", layer_types=["full_attention", "sliding_attention"] * 2, use_sliding_window=True, sliding_window=8
    )
    with pytest.raises(lmmhooks.ModelError, match="DynamicSlidingWindowLayer"):
        lmmhooks.wrap(zoo.model, ByValueNorm())


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_caches_of_one_length_are_refused(implementation):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, ByValueNorm()), pytest.raises(lmmhooks.PromptError, match="plain DynamicCache"):
        zoo.model.generate(**zoo.inputs(batch=1), max_new_tokens=2, cache_implementation=implementation)


def test_drafts_that_came_with_the_prompt_cannot_be_taken_back():
    zoo = build("llava")
    # Every word occurs in the prompt, so that generated ones are looked up and drafts follow.
    inputs = zoo.inputs(batch=1, text=240)
    inputs["input_ids"][:, -240:] = torch.arange(8, 128).repeat(2)
    with lmmhooks.wrap(zoo.model, ByValueNorm()), pytest.raises(lmmhooks.PromptError, match="assisted decoding"):
        zoo.model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)


def test_generate_cannot_continue_a_compressed_cache():
    """It would feed tokens a second time: it finds out by the length of the cache what is new."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, text=30)
    with lmmhooks.wrap(zoo.model, ByValueNorm()):
        out = zoo.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[20, 21]])], dim=1)
        with pytest.raises(lmmhooks.PromptError, match="earlier cache"):
            zoo.model.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2)


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_chosen_entries_stand_in_order_at_the_right():
    scores = torch.tensor([[[5.0, 1.0, 4.0, 4.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0]]] * 2)
    chosen = best_entries(scores, [3, 1])
    index, real = right_aligned(chosen, [3, 1])
    assert index[0].tolist() == [[0, 2, 3], [2, 3, 4]]
    assert index[1, :, -1].tolist() == [0, 4]
    assert real.tolist() == [[True] * 3, [False, False, True]]


def test_rows_after_the_last_image():
    # 0 padding, 1 system, 2 visual, 3 text
    layout = Layout(torch.tensor([[0, 1, 2, 3, 2, 3, 3], [1, 1, 2, 2, 2, 2, 2], [3] * 6 + [0]]).to(torch.int8), ())
    rows = select_rows(layout, "after_last_image")
    assert rows.int().tolist() == [[0, 0, 0, 0, 0, 1, 1], [0] * 7, [1] * 6 + [0]]
    rows = select_rows(layout, "after_last_image+3")
    assert rows.int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [1] * 6 + [0]]
