"""Passes that share what they have in common say what passes say that read everything, and read less."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines import once
from lmmhooks.prompting import Prompter, answer, build_inputs
from tests.engines.lookers import BUNDLED, MODELS, PROMPT, Looks, loaded, looking, noise
from tests.zoo import FAMILIES

# Readings that are split in two sum in another order; logits of these models are about 1 to 10.
TOLERANCE = 1e-5
IMAGE, OTHER = noise(60, 40), noise(60, 40, seed=1)
CROP = IMAGE.crop((10, 5, 40, 38))


def logits(model, processor, images, prompt, tokens):
    """Raw logits of a plain model while it generates these tokens."""
    inputs = build_inputs(processor, images, prompt)
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1)[0]


#: Passes about one image after the other that share something: prompts, images, whole prompts, and nothing.
PASSES = [
    ([IMAGE], PROMPT),
    ([IMAGE], "Where is the square?"),
    ([IMAGE], PROMPT),
    ([IMAGE, CROP], PROMPT),
    ([IMAGE, CROP], PROMPT + " And where?"),
    ([IMAGE, OTHER], PROMPT),
    ([OTHER], PROMPT),
    ([CROP], PROMPT),
    ([CROP, IMAGE], PROMPT),
    ([IMAGE, IMAGE], PROMPT),
    ([], PROMPT),
    ([IMAGE], "What is it?"),
]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_shared_changes_nothing(name):
    model, processor = loaded(name)
    expected = [logits(model, processor, images, prompt, 4) for images, prompt in PASSES]
    with looking(model, processor, IMAGE) as (look, engine):
        assert engine.once.shares
        for (images, prompt), plain in zip(PASSES, expected, strict=True):
            reply = look.tell(prompt, images, max_new_tokens=4, do_sample=False)
            torch.testing.assert_close(reply.logits, plain[: len(reply.tokens)], atol=TOLERANCE, rtol=TOLERANCE)
            assert reply.tokens == tuple(plain[: len(reply.tokens)].argmax(dim=-1).tolist())


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_read_from_where_they_part(name):
    model, processor = loaded(name)
    prompts = [PROMPT, PROMPT[:-1] + " now?", "Where?"]
    lengths, rows = [], [build_inputs(processor, [IMAGE], prompt)["input_ids"][0].tolist() for prompt in prompts]
    with looking(model, processor, IMAGE) as (look, engine):
        for prompt in prompts:
            look.score(prompt)
            lengths.append(engine.once.num_read)
        assert engine.once.num_encoded == 1
        look.score(prompts[-1])
        assert engine.once.num_read == 1
        look.tell(prompts[-1], [IMAGE, CROP], max_new_tokens=1)
        both = build_inputs(processor, [IMAGE, CROP], prompts[-1])["input_ids"].shape[1]
        if look.family.encodes_images_alone:
            assert engine.once.num_encoded == 2
            # The first image is not read again.
            assert engine.once.num_read < both - len(look._span())
        else:
            # What is tiled alone is not beside others: only the text before it stays the same.
            assert engine.once.num_encoded == 1
            assert both - 30 < engine.once.num_read < both
    assert lengths[0] == len(rows[0])
    for before, row, num_read in zip(rows, rows[1:], lengths[1:], strict=False):
        same = next(place for place, (a, b) in enumerate(zip(before, row, strict=False)) if a != b)
        assert num_read == len(row) - same


@pytest.mark.parametrize("name", BUNDLED)
def test_a_second_question_about_an_image_shares_and_another_image_does_not(name):
    model, processor = loaded(name)
    notes = []

    def act(look, prompt, **kwargs):
        text = look.tell(prompt, **kwargs).text
        notes.append((look.engine.once.num_read, look.engine.once.num_encoded, sorted(look.memory)))
        look.memory[prompt] = True
        return text

    asked = [(IMAGE, PROMPT), (IMAGE.copy(), "Where is it?"), (OTHER, PROMPT), (IMAGE, PROMPT)]
    expected = [answer(model, processor, image, prompt, max_new_tokens=3, do_sample=False) for image, prompt in asked]
    with lmmhooks.wrap(model, Looks(act=act), processor=processor) as patch:
        found = [patch.answer(image, prompt, max_new_tokens=3, do_sample=False) for image, prompt in asked]
    assert found == expected
    num_read, num_encoded, remembered = zip(*notes, strict=True)
    full = [build_inputs(processor, [image], prompt)["input_ids"].shape[1] for image, prompt in asked]
    assert num_read[0] == full[0]
    assert num_read[1] < full[1] - 16
    assert num_read[2:] == tuple(full[2:])
    assert num_encoded == (1, 1, 2, 3)
    assert remembered == ([], [PROMPT], [], [])


def test_weights_that_change_are_read_anew():
    model, processor = lmmhooks.load("tiny-llava", dtype=torch.float32)
    with looking(model, processor, IMAGE) as (look, engine):
        look.score(PROMPT)
        with torch.no_grad():
            model.lm_head.weight.add_(0.0)
            model.model.multi_modal_projector.linear_1.weight.mul_(0.5)
        again = engine.asker(Prompter(processor), IMAGE, PROMPT, {})
        found = again.score(PROMPT)
        assert engine.once.num_encoded == 2
    torch.testing.assert_close(found, logits(model, processor, [IMAGE], PROMPT, 1)[0], atol=1e-5, rtol=1e-5)


def test_only_so_many_images_and_prompts_are_kept(monkeypatch):
    monkeypatch.setattr(once, "NUM_ENCODED", 3)
    model, processor = loaded("tiny-qwen")
    with looking(model, processor, IMAGE) as (look, engine):
        for seed in range(4):
            look.tell(PROMPT, [IMAGE, noise(60, 40, seed=10 + seed)], max_new_tokens=1)
        assert len(engine.once._features) == 3
        assert len(engine.once._prompts) == once.NUM_KEPT
        # Five images went through the encoder: the one that is always shown is among those that stay.
        assert engine.once.num_encoded == 5
        look.score(PROMPT)
        assert engine.once.num_encoded == 5


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("kwargs", [{"do_sample": True, "temperature": 0.9}, {"num_beams": 3, "do_sample": False}])
def test_sampling_and_beams_go_through(name, kwargs):
    model, processor = loaded(name)
    for images in ([IMAGE], [IMAGE, CROP]):
        torch.manual_seed(5)
        plain = answer(model, processor, images, PROMPT, max_new_tokens=6, **kwargs)
        with looking(model, processor, IMAGE) as (look, _):
            look.score(PROMPT)
            torch.manual_seed(5)
            assert look.tell(PROMPT, images, max_new_tokens=6, **kwargs).text == plain


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("beside", ["var(rho=0.3, tau=2.6, sink_dims='any')", "fastervlm(keep=16)", "vcd", "dola"])
def test_beside_other_methods_everything_is_read(name, beside):
    model, processor = loaded(name)
    kwargs = {"max_new_tokens": 3, "do_sample": False}
    passes = PASSES[:6:2]
    with lmmhooks.wrap(model, beside, processor=processor):
        plain = [answer(model, processor, images, prompt, **kwargs) for images, prompt in passes]
    with looking(model, processor, IMAGE, beside) as (look, engine):
        assert not engine.once.shares
        for (images, prompt), expected in zip(passes, plain, strict=True):
            assert look.tell(prompt, images, **kwargs).text == expected
            assert engine.once.num_read == build_inputs(processor, images, prompt)["input_ids"].shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_an_offset_on_the_embeddings_is_added_and_shares_nothing(name):
    model, processor = loaded(name)
    with looking(model, processor, IMAGE) as (look, engine):
        look.score(PROMPT)
        before = engine.once._prompts
        width = look.family.text_config.hidden_size
        offset = torch.randn(look.geometry.num_tokens, width, generator=torch.Generator().manual_seed(0)) / 4
        found = look.tell(PROMPT, offset=offset, max_new_tokens=3, do_sample=False)
        assert engine.once._prompts is before
        assert engine.once.num_read == build_inputs(processor, [IMAGE], PROMPT)["input_ids"].shape[1]
        inputs, positions = build_inputs(processor, [IMAGE], PROMPT), look._span().positions
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": _plus(kwargs["inputs_embeds"])}),
        with_kwargs=True,
    )

    def _plus(embeds):
        return embeds.index_add(1, positions, offset[None]) if embeds.shape[1] > 1 else embeds

    try:
        with torch.no_grad():
            plain = model(**inputs).logits[0, -1]
    finally:
        handle.remove()
    torch.testing.assert_close(found.logits[0], plain, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_offset_acts_beside_other_methods_too():
    model, processor = loaded("tiny-qwen")
    with looking(model, processor, IMAGE) as (look, _):
        offset = torch.full((look.geometry.num_tokens, look.family.text_config.hidden_size), 0.3)
        expected = look.tell(PROMPT, offset=offset, max_new_tokens=1).logits
    with looking(model, processor, IMAGE, "attention-identity", "vaf(enh=1.0, sup=1.0)") as (look, engine):
        assert not engine.once.shares
        found = look.tell(PROMPT, offset=offset, max_new_tokens=1).logits
        assert not torch.allclose(found, look.tell(PROMPT, max_new_tokens=1).logits, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["tiny-llava", "qwen3_vl"])
def test_a_pass_that_fails_leaves_the_engine_usable(name):
    model, processor = loaded(name)
    plain = logits(model, processor, [IMAGE, CROP], PROMPT, 3)

    class Broken(Exception):
        pass

    def fail(*args):
        raise Broken

    with looking(model, processor, IMAGE) as (look, _):
        look.score("Where is it?")
        passes = [
            lambda image: look.tell(PROMPT, [image, CROP], max_new_tokens=2),
            lambda image: look.at(image).watch(PROMPT, max_new_tokens=2),
            lambda image: look.at(image).gradient(PROMPT, 1),
        ]
        seed = 100
        for module in (look.family.layers[0], look.family.vision_layers[0], look.family.core):
            for run in passes:
                # An image that was seen would not go through the encoder.
                seed += 1
                with module.register_forward_pre_hook(fail), pytest.raises(Broken):
                    run(noise(50, 30, seed))
        reply = look.tell(PROMPT, [IMAGE, CROP], max_new_tokens=3, do_sample=False)
        torch.testing.assert_close(reply.logits, plain[: len(reply.tokens)], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_stays_behind(name):
    model, processor = loaded(name)
    parts = [model, model.model, model.model.language_model]
    inputs = build_inputs(processor, [IMAGE], PROMPT)
    with torch.no_grad():
        model(**inputs)
        attributes = [sorted(vars(part)) for part in parts]
        plain = model(**inputs).logits
        with looking(model, processor, IMAGE) as (look, _):
            look.watch(PROMPT, max_new_tokens=2)
            look.tell(PROMPT, [IMAGE, CROP], max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, plain)
        with lmmhooks.wrap(model, Looks(), processor=processor) as patch, patch.disabled():
            assert torch.equal(model(**inputs).logits, plain)
            assert len(model.generate(**inputs, max_new_tokens=1)[0]) == inputs["input_ids"].shape[1] + 1
    assert [sorted(vars(part)) for part in parts] == attributes
