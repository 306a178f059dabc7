"""What a look reads of a model, against full forwards with eager attention and the graph of the whole prompt."""

from __future__ import annotations

import warnings

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.prompting import answer, build_inputs
from tests.engines.lookers import BUNDLED, MODELS, PROMPT, Looks, loaded, looking, noise
from tests.zoo import FAMILIES

IMAGE, OTHER = noise(60, 40), noise(150, 40, seed=1)
LAYER = 1
#: What others do to prompts must not reach what a look reads without them.
BESIDE = [
    (),
    ("vaf(enh=2.0, sup=0.3)",),
    ("fastv(keep=4)",),
    ("shortv(layers=(1, 2))",),
    ("vcd(beta=0.0)",),
    ("lqcd(neutralise=False, leading=[11, 12, 13], beta=0.0)",),
]


def visual(model, inputs):
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    return (inputs["input_ids"][0] == token).nonzero()[:, 0]


def extended(inputs, token):
    """Inputs that go on with a token."""
    out = dict(inputs)
    for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            out[name] = torch.cat([inputs[name], inputs[name].new_tensor([[value]])], dim=1)
    return out


def eager_rows(model, inputs, layers, steps):
    """``[T, L, H, n]``: a full forward per token of the greedy answer."""
    positions, rows = visual(model, inputs), []
    for _ in range(steps):
        with torch.no_grad():
            out = model(**inputs, output_attentions=True, use_cache=False)
        rows.append(torch.stack([out.attentions[layer][0, :, -1, positions] for layer in layers]))
        token = int(out.logits[0, -1].argmax())
        if token == model.generation_config.eos_token_id:
            break
        inputs = extended(inputs, token)
    return torch.stack(rows)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_that_of_full_forwards(name):
    (model, processor), (eager, _) = loaded(name), loaded(name, "eager")
    with looking(model, processor, IMAGE, read=(1, 3)) as (look, engine):
        look.watch("What is this?", max_new_tokens=2)
        seen = look.watch(PROMPT, max_new_tokens=4)
        inputs = build_inputs(processor, [IMAGE], PROMPT)
        assert engine.once.num_read < inputs["input_ids"].shape[1]
        expected = eager_rows(eager, inputs, (1, 3), 4)
        assert len(seen.rows) == len(seen.reply.tokens)
        torch.testing.assert_close(seen.rows, expected, atol=1e-6, rtol=1e-4)
        assert seen.prompt_length == inputs["input_ids"].shape[1]
        assert seen.reply.text == answer(model, processor, IMAGE, PROMPT, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("beside", [*BESIDE[4:], ("dola",), ("vcd(lazy=True)",), ("avisc(beta=0.0)",)])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_attention_beside_branches_is_that_of_the_prompt_as_given(name, beside):
    (model, processor), (eager, _) = loaded(name), loaded(name, "eager")
    with looking(model, processor, IMAGE, *beside) as (look, _):
        seen = look.watch(PROMPT, max_new_tokens=3)
    inputs = build_inputs(processor, [IMAGE], PROMPT)
    assert seen.prompt_length == inputs["input_ids"].shape[1]
    assert len(seen.rows) == len(seen.reply.tokens)
    for row, token in zip(seen.rows, seen.reply.tokens, strict=True):
        torch.testing.assert_close(row[None], eager_rows(eager, inputs, (1, 2), 1), atol=1e-6, rtol=1e-4)
        inputs = extended(inputs, token)


def test_attention_beside_a_reducer_is_none_for_tokens_that_are_gone():
    (model, processor), (eager, _) = loaded("llava"), loaded("llava", "eager")
    with looking(model, processor, IMAGE, "fastv(keep=5, layer=2)", read=(1, 3)) as (look, _):
        seen = look.watch(PROMPT, max_new_tokens=3)
    assert seen.rows.shape[-1] == 16
    expected = eager_rows(eager, build_inputs(processor, [IMAGE], PROMPT), (1,), 1)
    torch.testing.assert_close(seen.rows[:1, :1], expected, atol=1e-6, rtol=1e-4)
    assert seen.rows[:, 1].gt(0).any(dim=1).sum(dim=-1).tolist() == [5] * len(seen.rows)


# -- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside"),
    # Beside other methods, one model of each kind of positions.
    [(name, beside) for name in MODELS for beside in BESIDE if not beside or name in ("llava", "qwen3_vl")],
)
def test_the_gradient_is_that_of_the_whole_graph(name, beside):
    (model, processor), (eager, _) = loaded(name, dtype=torch.float64), loaded(name, "eager", torch.float64)
    inputs = build_inputs(processor, [IMAGE], PROMPT, dtype=torch.float64)
    positions = visual(model, inputs)
    out = eager(**inputs, output_attentions=True, use_cache=False)
    weights = out.attentions[LAYER]
    [gradient] = torch.autograd.grad(out.logits[0, -1].log_softmax(dim=-1).max(), weights)
    with looking(model, processor, IMAGE, *beside) as (look, engine):
        if engine.once.shares:
            look.watch("What else?", max_new_tokens=1)
        attention, found = look.gradient(PROMPT, LAYER)
        assert len(found[0]) == look.geometry.num_tokens
    torch.testing.assert_close(attention.double(), weights[0, :, -1, positions].detach(), atol=1e-7, rtol=1e-5)
    expected = gradient[0, :, -1, positions]
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: "+".join(beside) or "alone")
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "qwen3_vl"])
def test_steering_has_the_graph_of_a_full_forward(name, beside):
    (model, processor), (eager, _) = loaded(name, dtype=torch.float64), loaded(name, "eager", torch.float64)
    inputs = build_inputs(processor, [IMAGE], PROMPT, dtype=torch.float64)
    positions = visual(model, inputs)
    generator = torch.Generator().manual_seed(0)
    offset = torch.randn(len(positions), 64, generator=generator, dtype=torch.float64) / 8
    mine, other = offset.clone().requires_grad_(), offset.clone().requires_grad_()
    with looking(model, processor, IMAGE, *beside) as (look, _):
        found = look.steer(PROMPT, (0, 2), mine)
    handle = eager.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].detach().index_add(1, positions, other[None])},
        ),
        with_kwargs=True,
    )
    try:
        attentions = eager(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        handle.remove()
    first = int(positions[-1]) + 1
    expected = torch.stack([attentions[layer][0, :, first:][..., positions] for layer in (0, 2)])
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-5)
    weights = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
    [gradient] = torch.autograd.grad((found * weights).sum(), mine)
    [whole] = torch.autograd.grad((expected * weights).sum(), other)
    torch.testing.assert_close(gradient, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: "+".join(beside) or "alone")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_pixel_gradients_are_those_of_the_whole_graph(name, beside):
    model, processor = loaded(name, dtype=torch.float64)
    inputs = build_inputs(processor, [IMAGE], PROMPT, dtype=torch.float64)
    inputs["pixel_values"].requires_grad_()
    chance = model(**inputs, use_cache=False).logits[0, -1].log_softmax(dim=-1).max()
    [expected] = torch.autograd.grad(chance, inputs["pixel_values"])
    with looking(model, processor, IMAGE, *beside) as (look, _):
        found = look.pixel_gradient(PROMPT)
        assert look.geometry.num_tokens == len(visual(model, inputs))
    # Qwen models read a still image as two frames, whose derivatives differ.
    assert len(found) == (1 if name == "llava" else 2)
    total = float(expected.abs().sum())
    if name == "llava":
        torch.testing.assert_close(found[0].double(), expected[0], atol=1e-7 * total, rtol=1e-4)
    assert sum(float(part.double().sum()) for part in found) == pytest.approx(float(expected.sum()), abs=1e-6 * total)


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: "+".join(beside) or "alone")
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen3_vl"])
def test_matrices_are_those_of_a_full_forward(name, beside):
    (model, processor), (eager, _) = loaded(name), loaded(name, "eager")
    inputs, reply = build_inputs(processor, [IMAGE], PROMPT), (20, 21, 22)
    for token in reply:
        inputs = extended(inputs, token)
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True, use_cache=False).attentions
    with looking(model, processor, IMAGE, *beside) as (look, _):
        folded, positions = look.matrices(PROMPT, reply, lambda attention: attention * 2)
    assert positions.tolist() == visual(model, inputs).tolist()
    expected = torch.stack([2 * layer[0].mean(dim=0) for layer in attentions])
    torch.testing.assert_close(folded, expected, atol=1e-6, rtol=1e-4)


# -- geometry, settings, bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_geometry_is_that_of_the_image_in_front_whatever_was_shown_last(name):
    model, processor = loaded(name)
    with looking(model, processor, OTHER) as (other, _):
        other.watch(PROMPT, max_new_tokens=1)
        expected = other.geometry.rectangles()
    with looking(model, processor, IMAGE) as (look, engine):
        look.watch(PROMPT, max_new_tokens=1)
        tile = look.at(OTHER)
        assert torch.equal(tile.geometry.rectangles().nan_to_num(-1), expected.nan_to_num(-1))
        tile = look.at(OTHER)
        look.tell("Hello?", [], max_new_tokens=1)
        read = engine.once.num_read
        assert torch.equal(tile.geometry.rectangles().nan_to_num(-1), expected.nan_to_num(-1))
        assert tile.geometry.size == OTHER.size
        assert read < 40


def test_answers_follow_the_settings_of_the_model_and_readings_do_not(monkeypatch):
    model, processor = loaded("tiny-qwen")
    with looking(model, processor, IMAGE) as (look, _):
        greedy = look.watch(PROMPT, max_new_tokens=5).reply.text
        for name, value in {"do_sample": True, "temperature": 8.0, "num_beams": 1}.items():
            monkeypatch.setattr(model.generation_config, name, value)
        assert look.watch(PROMPT, max_new_tokens=5).reply.text == greedy
        torch.manual_seed(0)
        drawn = look.tell(PROMPT, max_new_tokens=5).text
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert look.score(PROMPT).argmax() == look.score(PROMPT).argmax()
    torch.manual_seed(0)
    assert drawn == answer(model, processor, IMAGE, PROMPT, max_new_tokens=5) != greedy


@pytest.mark.parametrize("name", BUNDLED)
def test_prompts_without_an_image_are_answered_plainly(name):
    model, processor = loaded(name)
    plain = answer(model, processor, None, "Hello?", max_new_tokens=3)
    with lmmhooks.wrap(model, Looks(), processor=processor) as patch:
        assert patch.answer(None, "Hello?", max_new_tokens=3) == plain
        assert patch.answer([], "Hello?", max_new_tokens=3) == plain
        with pytest.raises(PromptError, match="region was given without an image"):
            patch.answer(None, "Hello?", region=(0, 0, 1, 1))


def test_several_images_regions_outside_and_generate_are_refused():
    model, processor = loaded("tiny-llava")
    inputs = build_inputs(processor, [IMAGE], PROMPT)
    with lmmhooks.wrap(model, Looks(), processor=processor) as patch:
        with pytest.raises(PromptError, match="looks at one image, and was given 2"):
            patch.answer([IMAGE, OTHER], PROMPT)
        for region in ((0, 0, 61, 10), (5, 5, 5, 9), (-1, 0, 4, 4), (1, 2, 3)):
            with pytest.raises(PromptError, match="no part of the image of 60 x 40 pixels"):
                patch.answer(IMAGE, PROMPT, region=region)
        with pytest.raises(PromptError, match=r"call patch\.answer"):
            model.generate(**inputs)
    with (
        lmmhooks.wrap(model, Looks(act=lambda look, prompt: look.tell(prompt).text)) as patch,
        pytest.raises(PromptError, match="no processor is known"),
    ):
        patch.answer(IMAGE, PROMPT)


def test_compressed_caches_hide_what_is_looked_at():
    model, processor = loaded("tiny-llava")
    with pytest.raises(MethodError, match="looks cannot be combined with look-m"):
        lmmhooks.wrap(model, "look-m", Looks(), processor=processor)
    lmmhooks.unwrap(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_words_and_colours_of_a_model(name):
    model, processor = loaded(name)
    with looking(model, processor, IMAGE) as (look, _):
        assert look.token("a") == processor.tokenizer.convert_tokens_to_ids("a")
        with pytest.raises(PromptError, match="'ab' is 2 tokens"):
            look.token("ab")
        mean = processor.image_processor.image_mean
        assert look.mean_color == tuple(int(255 * value) for value in mean)
