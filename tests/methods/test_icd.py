"""ICD against separate forwards on disturbed prompts, and where the disturbance goes in prompts of real tokenizers."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.icd import Icd
from lmmhooks.methods.decoding.prompts import question_span
from lmmhooks.prompting import build_inputs
from tests.methods.readings import FAMILIES, MODES, check_logits, check_tokens, composes, lazily_the_same
from tests.reference.decoding import edited_inputs, noised_inputs
from tests.zoo import build

DISTURBANCE = (11, 12, 13)


def naive(alpha=1.0, beta=0.1, vcd_alpha=None):
    """Both contrasts of the formula, masked each by itself and added."""

    def combine(main, others, step):
        cut = float(main.max()) + (math.log(beta) if beta else -math.inf)
        total = torch.zeros_like(main)
        strengths = [strength for strength in (alpha, vcd_alpha) if strength]
        for strength, other in zip(strengths, others, strict=True):
            total += (1 + strength) * main - strength * other
        if vcd_alpha == 0:
            total += main
        total[main < cut] = -math.inf
        return total

    return combine


def disturbed(zoo, inputs):
    """Three tokens behind the last visual one of every row; a row without image as it is."""
    visual = resolve(zoo.model).visual_ids

    def edit(row):
        places = [place for place, token in enumerate(row) if token in visual]
        return row[: places[-1] + 1] + list(DISTURBANCE) + row[places[-1] + 1 :] if places else row

    return edited_inputs(inputs, edit)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_forwards(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    method = Icd(disturbance=DISTURBANCE, beta=0.02)
    check_logits(zoo, inputs, method, [disturbed(zoo, inputs)], naive(beta=0.02))


@pytest.mark.parametrize("vcd_alpha", [0.0, 0.5])
def test_with_vcd_both_masked_contrasts_are_added(vcd_alpha):
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    method = Icd(disturbance=DISTURBANCE, beta=0.02, vcd_alpha=vcd_alpha)
    others = [disturbed(zoo, inputs), *([noised_inputs(zoo, inputs)] if vcd_alpha else [])]
    check_logits(zoo, inputs, method, others, naive(beta=0.02, vcd_alpha=vcd_alpha))


@pytest.mark.parametrize("mode", MODES)
def test_generates_the_tokens_of_the_naive_rendering(mode):
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=2)
    method = Icd(disturbance=DISTURBANCE, beta=0.02)
    check_tokens(zoo, inputs, method, [disturbed(zoo, inputs)], naive(beta=0.02), mode)


def test_lazy_branches_change_nothing():
    zoo = build("llava")
    settings = {"disturbance": DISTURBANCE, "beta": 0.9}
    lazily_the_same(zoo, zoo.inputs(batch=2), Icd(**settings), Icd(**settings, lazy=True))


def test_composes():
    zoo = build("llava")
    composes(zoo, zoo.inputs(batch=2), "icd(disturbance=[11, 12, 13], beta=0.0)")


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"disturbance": ""}, {"disturbance": ()}])
def test_without_contrast_what_is_left_is_the_plausibility_cut(settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Icd(beta=0.3, **settings)) as patch:
            cut = zoo.model(**inputs).logits
            assert patch.stats.branches == 1
    assert torch.equal(cut[cut.isfinite()], plain[cut.isfinite()])
    assert torch.equal(cut.isfinite(), plain >= plain.amax(-1, keepdim=True) + math.log(0.3))
    assert Icd(beta=0.0, **settings).is_identity


def test_a_row_without_image_is_not_contrasted():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=(0, 1))
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Icd(disturbance=DISTURBANCE, beta=0.0)):
            out = zoo.model(**inputs).logits[:, -1]
    torch.testing.assert_close(out[0], plain[0], atol=2e-5, rtol=0)  # the same numbers in a larger batch, times 2 - 1
    assert (out[1] - plain[1]).abs().max() > 0.01


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def loaded(request):
    return lmmhooks.load(request.param)


def row_of(processor, question, image_first=True):
    """Ids of a chat prompt with one image, unexpanded."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content if image_first else content[::-1]}], add_generation_prompt=True
    )
    return torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_disturbance_stands_between_image_and_question(loaded):
    model, processor = loaded
    context, row = BranchContext(resolve(model), processor), row_of(processor, "Is there a cup in the image?")
    start, stop = question_span(row, context)
    assert processor.tokenizer.decode(row[start:stop]) == "Is there a cup in the image?"
    out = Icd().edit_tokens(row, None, context)
    text, changed = (processor.tokenizer.decode(ids) for ids in (row, out))
    assert changed == text.replace("Is there", "You are a confused object detector. Is there")


def test_as_system_message_the_disturbance_replaces_the_one_that_is_there(loaded):
    model, processor = loaded
    context, row = BranchContext(resolve(model), processor), row_of(processor, "Is there a cup in the image?")
    out = Icd(place="system", disturbance="You are blind.").edit_tokens(row, None, context)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You are blind."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a cup in the image?"}]},
    ]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert processor.tokenizer.decode(out) == expected


class TemplateOfProcessor:
    """A processor whose tokenizer has no chat template of its own, as LLaVA-1.5 comes."""

    def __init__(self, processor):
        self.chat_template = processor.chat_template
        self.apply_chat_template = processor.apply_chat_template
        self.tokenizer = TokenizerAlone(processor.tokenizer)


class TokenizerAlone:
    chat_template = None

    def __init__(self, tokenizer):
        self.encode, self.decode = tokenizer, tokenizer.decode

    def __call__(self, *args, **kwargs):
        return self.encode(*args, **kwargs)


def test_what_opens_the_answer_is_told_by_the_template_of_the_processor():
    model, processor = lmmhooks.load("tiny-llava")
    context = BranchContext(resolve(model), TemplateOfProcessor(processor))
    row = row_of(processor, "Is there a cup in the image?")
    start, stop = question_span(row, context)
    assert processor.tokenizer.decode(row[start:stop]) == "Is there a cup in the image?"
    # A prompt that ends otherwise has nothing of it, whatever its last token is.
    otherwise = torch.cat([row[:-2], row[-1:]])
    assert question_span(otherwise, context) == (start, len(otherwise))


def test_a_start_token_stays_in_front_of_the_new_system_message():
    model, processor = lmmhooks.load("tiny-llava")
    context, row = BranchContext(resolve(model), processor), row_of(processor, "Is there a cup in the image?")
    bos = torch.tensor([processor.tokenizer.bos_token_id])
    out = Icd(place="system").edit_tokens(torch.cat([bos, row]), None, context)
    assert out[0] == bos
    assert torch.equal(out[1:], Icd(place="system").edit_tokens(row, None, context))


def test_a_prompt_that_the_template_would_not_write_is_refused(loaded):
    model, processor = loaded
    if "vision_start" not in processor.chat_template:
        pytest.skip("this template puts images first wherever they stand")
    row = row_of(processor, "Is there a cup in the image?", image_first=False)
    with pytest.raises(PromptError, match="image first, or use place='question'"):
        Icd(place="system").edit_tokens(row, None, BranchContext(resolve(model), processor))


def test_generates_with_the_disturbance_of_the_paper(loaded):
    model, processor = loaded
    inputs = build_inputs(processor, [picture()], "Is there a cup in the image?")
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits
        for place in ("question", "system"):
            with lmmhooks.wrap(model, Icd(place=place, beta=0.0), processor=processor):
                out = model(**inputs, logits_to_keep=1).logits
            assert (out - plain).abs().max() > 0.1


def picture():
    from PIL import Image

    return Image.radial_gradient("L").resize((112, 112)).convert("RGB")


def test_text_needs_a_processor():
    with pytest.raises(MethodError, match=r"needs the model's tokenizer.*processor=processor"):
        lmmhooks.wrap(build("llava").model, "icd")


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": -1},
        {"place": "end"},
        {"disturbance": 3},
        {"disturbance": (1, -2)},
        {"disturbance": (1, 2), "place": "system"},
        {"vcd_alpha": -0.5},
        {"vcd_alpha": 0.0, "alpha": 0.0},
        {"noise_step": 1000},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"icd: {next(iter(settings))}="):
        Icd(**settings)
