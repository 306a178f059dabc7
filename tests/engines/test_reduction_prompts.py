"""What a reduced prompt promises its caller: lengths, loss, continuation, nothing left behind, clear refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.base import CropwiseMethod
from tests.engines.reducers import MROPE, TOLERANCE, ByNorm, naive_by_norm, visual_groups
from tests.reference.reduction import reduced_logits
from tests.zoo import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_are_as_long_as_the_sequence_their_layer_saw(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1], text=5)
    with lmmhooks.wrap(zoo.model, ByNorm(layers=(1, 3), shares=(0.5, 0.25))) as patch:
        out = zoo.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        stats = patch.stats
    full, lengths = inputs["input_ids"].shape[1], [layer.get_seq_length() for layer in out.past_key_values.layers]
    valid = inputs["attention_mask"].sum(dim=1)
    visual = torch.tensor(stats.layers[0].visual_in)
    for layer, length in enumerate(lengths):
        kept = torch.tensor(stats.layers[layer].visual_kept)
        # Of three generated tokens, two were fed back.
        assert length == (full if layer == 0 else int((valid - visual + kept).max())) + 2
    groups = [visual_groups(zoo.model, inputs, row) for row in range(2)]
    expected = [[sum(max(1, int(s * len(g))) for g in row) for row in groups] for s in (0.5, 0.25)]
    assert [list(stats.layers[i].visual_kept) for i in (1, 2, 3)] == [expected[0], expected[0], expected[1]]


@pytest.mark.parametrize("method", ["reduction-identity", "random(keep={all})", "fastv(keep={all})"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bit_identical(family, method):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    # Where every image has equally many tokens, more than those are refused.
    method = method.format(all=resolve(zoo.model).tokens_per_image or 10000)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, method) as patch:
            assert any("final norm" in entry for entry in patch.attached)
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_a_share_of_one_attaches_nothing():
    zoo = build("llava")
    for spec in ("random(keep=1.0)", "uniform-grid(keep=1.0)", "fastervlm(keep=1.0)", "fastv(keep=1.0)"):
        with lmmhooks.wrap(zoo.model, spec) as patch:
            assert patch.attached == []


def test_a_prompt_without_images_is_left_alone():
    zoo = build("llava")
    inputs = {key: value for key, value in zoo.inputs(batch=2, images=1).items() if key != "pixel_values"}
    inputs["input_ids"] = inputs["input_ids"].clamp(min=8)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.2))):
            assert torch.equal(zoo.model(**inputs).logits, plain)


@dataclass(frozen=True)
class FirstOfCrop(CropwiseMethod):
    """The first cells of every crop."""

    id: ClassVar[str] = "test-first-of-crop"

    def select(self, tokens):
        assert tokens.grid is not None
        return torch.arange(tokens.num_keep).expand(len(tokens.sample), -1)


@pytest.mark.parametrize("newline", ["drop", "keep_per_row", "per_kept_row"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newline_tokens_follow_the_policy(family, newline):
    zoo = build(family)
    inputs = zoo.inputs(batch=1, images=1)
    method = FirstOfCrop(keep=3, keep_per="crop", newline=newline)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    tokens, kept = state.layout.spans[0].tokens, state.stages[0].layout.spans[0].tokens
    # Cell by cell: which rows of the mosaic still hold a token.
    expected, first_left, row_start = [], [3] * len(tokens.grids), 0
    cells = list(zip(tokens.crop.tolist(), tokens.row.tolist(), tokens.col.tolist(), strict=True))
    for place, (crop, row, col) in enumerate(cells):
        if crop >= 0:
            if first_left[crop]:
                first_left[crop] -= 1
                expected.append((crop, row, col))
            continue
        in_row = [
            cell for cell in cells[row_start:place] if cell[0] != 0 or place < len(cells[: tokens.grids[0][0] ** 2])
        ]
        row_start = place + 1
        if newline == "keep_per_row" or (newline == "per_kept_row" and any(cell in expected for cell in in_row)):
            expected.append((crop, row, col))
    assert list(zip(kept.crop.tolist(), kept.row.tolist(), kept.col.tolist(), strict=True)) == expected
    newlines = sum(cell[0] < 0 for cell in expected)
    assert newlines == {"drop": 0, "keep_per_row": sum(c[0] < 0 for c in cells)}.get(newline, newlines)
    if newline == "per_kept_row":
        assert 0 < newlines < sum(cell[0] < 0 for cell in cells)


def test_integers_count_per_image_or_per_crop():
    zoo = build("internvl")
    inputs = zoo.inputs(batch=1, images=2)  # three tiles and one, four tokens each
    for keep_per, expected in (("image", 6 + 4), ("crop", 12 + 4)):
        with lmmhooks.wrap(zoo.model, FirstOfCrop(keep=6, keep_per=keep_per)) as patch, torch.no_grad():
            zoo.model(**inputs)
            assert patch.stats.layers[0].visual_kept == (expected,)
    with lmmhooks.wrap(zoo.model, "fastv(keep=3, layer=1)") as patch, torch.no_grad():
        zoo.model(**inputs)
        assert patch.stats.layers[1].visual_kept == (6,), "3 per image, ranked together"


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_logits_to_keep_see_the_full_length(family):
    zoo = build(family, seed=1)
    inputs = zoo.inputs(batch=2)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.25))):
        out = zoo.model(**inputs, labels=labels)
        out.loss.backward()
        with torch.no_grad():
            last = zoo.model(**inputs, logits_to_keep=2).logits
    assert torch.equal(last, out.logits[:, -2:].detach())
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    gradient = zoo.model.model.language_model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    zoo.model.zero_grad()


@pytest.mark.parametrize("layers", [(0,), (2,)], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_text_may_continue_a_cache_without_positions(family, layers):
    """A plain loop over forward: the model itself would count positions from the shortened cache."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=1)
    method = ByNorm(layers=layers)
    more = torch.tensor([[20, 21, 22]])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        cache = DynamicCache(config=zoo.model.config.get_text_config())
        zoo.model(**inputs, past_key_values=cache)
        several = zoo.model(input_ids=more[:, :2], past_key_values=cache).logits
        one = zoo.model(input_ids=more[:, 2:], past_key_values=cache).logits
    cuts = {layers[0]: (naive_by_norm(visual_groups(eager.model, inputs, 0), 0.5), family not in MROPE)}
    expected = reduced_logits(eager.model, inputs, 0, cuts, more)[-3:]
    torch.testing.assert_close(torch.cat([several, one], dim=1)[0], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layers", [(0,), (2,)], ids=str)
def test_drafts_of_assisted_decoding_are_taken_back(layers):
    zoo = build("llava")
    # Every word occurs in the prompt, so that generated ones are looked up and drafts follow.
    inputs = zoo.inputs(batch=1, text=240)
    inputs["input_ids"][:, -240:] = torch.arange(8, 128).repeat(2)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": list(range(8))}
    with lmmhooks.wrap(zoo.model, ByNorm(layers=layers)):
        plain = zoo.model.generate(**inputs, **kwargs)
        assert torch.equal(zoo.model.generate(**inputs, **kwargs, prompt_lookup_num_tokens=3), plain)


def test_generate_may_continue_a_conversation():
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, ByNorm(layers=(2,), positions="repack")):
        out = zoo.model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
        ids = torch.cat([out.sequences, torch.tensor([[20, 21]])], dim=1)
        more = zoo.model.generate(
            input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2, min_new_tokens=2, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    answer = more.sequences[:, inputs["input_ids"].shape[1] : -1]
    cuts = {2: (naive_by_norm(visual_groups(eager.model, inputs, 0), 0.5), True)}
    expected = reduced_logits(eager.model, inputs, 0, cuts, answer)[-2:]
    torch.testing.assert_close(torch.stack(more.logits, dim=1)[0], expected, atol=TOLERANCE, rtol=0)


def test_prompts_may_interleave():
    zoo = build("llava")
    prompts = [zoo.inputs(batch=1, seed=seed, text=4 + seed) for seed in (0, 1)]
    token = torch.tensor([[30]])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.25))):
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


def test_an_exception_inside_leaves_the_next_prompt_unharmed():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    layer = zoo.model.model.language_model.layers[3]

    def fail(module, args):
        raise RuntimeError("from outside")

    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.25))):
        expected = zoo.model(**inputs).logits
        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="from outside"):
            zoo.model(**inputs)
        handle.remove()
        assert torch.equal(zoo.model(**inputs).logits, expected)
        assert find_runtime(zoo.model).current is None


def test_nothing_of_the_prompt_is_held_after_it_was_read():
    zoo = build("qwen3_vl")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 1), shares=(0.5, 0.25))):
        zoo.model(**zoo.inputs(batch=1))
        state = find_runtime(zoo.model).last
    held = [value for memory in state._memory.values() for value in memory]
    assert "left" not in held
    assert "deepstack" not in held
    assert all(not stage.scratch for stage in state.stages)


def test_half_precision_runs():
    zoo = build("qwen3_vl", dtype=torch.bfloat16)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 1), shares=(0.5, 0.25), average=True)):
        logits = zoo.model(**zoo.inputs(batch=2)).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_renumbering_grid_coordinates_is_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match="grid coordinates"):
        lmmhooks.wrap(build("qwen2_5_vl").model, ByNorm(positions="repack"))


def test_renumbering_hidden_tokens_is_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match="only hidden"):
        lmmhooks.wrap(build("llava").model, ByNorm(hide=True))


def test_sliding_windows_are_refused_at_wrap():
    zoo = build(
        "internvl", layer_types=["full_attention", "sliding_attention"] * 2, use_sliding_window=True, sliding_window=8
    )
    with pytest.raises(lmmhooks.ModelError, match="DynamicSlidingWindowLayer"):
        lmmhooks.wrap(zoo.model, ByNorm())


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_caches_of_one_length_are_refused(implementation):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, ByNorm()), pytest.raises(lmmhooks.PromptError, match="plain DynamicCache"):
        zoo.model.generate(**zoo.inputs(batch=1), max_new_tokens=2, cache_implementation=implementation)


def test_generate_cannot_continue_a_cache_that_was_shortened_before_its_first_layer():
    """It would feed tokens a second time: it finds out by the length of the cache what is new."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, text=30)
    with lmmhooks.wrap(zoo.model, ByNorm()):
        out = zoo.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[20, 21]])], dim=1)
        with pytest.raises(lmmhooks.PromptError, match="earlier cache"):
            zoo.model.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2)


def test_a_method_that_chooses_twice_is_told_so():
    @dataclass(frozen=True)
    class Twice(ByNorm):
        id: ClassVar[str] = "test-twice"

        def select(self, tokens):
            return torch.zeros(len(tokens.sample), tokens.num_keep, dtype=torch.long)

    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Twice()), pytest.raises(lmmhooks.MethodError, match="twice"):
        zoo.model(**zoo.inputs(batch=1))


def test_encoder_outputs_from_elsewhere_have_no_attention_to_read():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        features = zoo.model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        with (
            lmmhooks.wrap(zoo.model, "fastervlm(keep=4)"),
            pytest.raises(lmmhooks.PromptError, match="outside the patch"),
        ):
            zoo.model(**inputs, mm_encoder_outputs={"image": features})
