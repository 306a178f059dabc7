"""LQCD against separate forwards of the neutral and the leading query, and the rules that tell them apart."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.lqcd import Lqcd, without_spans
from lmmhooks.methods.decoding.neutral import neutralised, strength
from lmmhooks.prompting import build_inputs
from tests.methods.readings import FAMILIES, MODES, STEPS, TOLERANCE, check_logits, check_tokens, composes
from tests.reference.decoding import NaiveBranches, edited_inputs
from tests.zoo import build

LEADING = (11, 12)


def naive(alpha=1.0, beta=0.02):
    """The formula, token by token; the cut is that of the neutral query."""

    def combine(main, others, step):
        cut = float(main.max()) + (math.log(beta) if beta else -math.inf)
        pairs = zip(main.tolist(), others[0].tolist(), strict=True)
        return torch.tensor([(1 + alpha) * a - alpha * b if a >= cut else -math.inf for a, b in pairs])

    return combine


def led(zoo, inputs):
    visual = resolve(zoo.model).visual_ids
    return edited_inputs(inputs, lambda row: [*row, *LEADING] if set(row) & set(visual) else row)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neutral_query_is_contrasted_with_one_that_is_made_to_lead(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    method = Lqcd(neutralise=False, leading=LEADING, beta=0.02)
    check_logits(zoo, inputs, method, [led(zoo, inputs)], naive())


@pytest.mark.parametrize("mode", MODES)
def test_generates_the_tokens_of_the_naive_rendering(mode):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = Lqcd(neutralise=False, leading=LEADING, beta=0.02)
    check_tokens(zoo, inputs, method, [led(zoo, inputs)], naive(), mode)


def test_composes():
    zoo = build("llava")
    composes(zoo, zoo.inputs(batch=2), "lqcd(neutralise=False, leading=[11, 12], beta=0.0)")


# -- the model reads the neutral query ---------------------------------------------------------------------------------

NEUTRAL = "Is there a cup in the image?"
QUERIES = (f"I am sure there is one. {NEUTRAL}", NEUTRAL)


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def loaded(request):
    return lmmhooks.load(request.param, dtype="float32")


def picture():
    return Image.radial_gradient("L").resize((112, 112)).convert("RGB")


def batch(processor, queries):
    """Chat prompts about one picture, padded on the left."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": query}]}],
            add_generation_prompt=True,
        )
        for query in queries
    ]
    return processor(images=[picture()] * len(texts), text=texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_main_rows_read_and_continue_the_neutral_query(loaded, num_beams):
    """Each row against the plain model on either wording; the second has nothing that leads until it is added."""
    model, processor = loaded
    method = Lqcd(alpha=0.5, beta=0.0, leading=" I think so.")
    inputs = batch(processor, QUERIES)
    with lmmhooks.wrap(model, method, processor=processor) as patch:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, num_beams=num_beams, return_dict_in_generate=True
        )
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
        notes = patch.stats.notes
    assert [note["neutral"] for note in notes] == [NEUTRAL, NEUTRAL]
    assert [note["leading"] for note in notes] == [QUERIES[0], NEUTRAL + " I think so."]
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    # What generate returns begins with the prompt as given.
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    neutral = build_inputs(processor, [picture()], NEUTRAL)
    for row, leading in enumerate((QUERIES[0], NEUTRAL + " I think so.")):
        other = build_inputs(processor, [picture()], leading)
        forwards = NaiveBranches(model, neutral, [other], naive(alpha=0.5, beta=0.0))
        torch.testing.assert_close(logits[row], forwards.logits(answer[:1, :0])[0], atol=TOLERANCE, rtol=0)
        if num_beams == 1:
            for step in range(answer.shape[1]):
                if model.generation_config.eos_token_id in answer[row, :step].tolist():
                    break  # what follows the end of a row is padding
                expected = forwards.logits(answer[row : row + 1, :step])
                assert int(expected.argmax()) == int(answer[row, step])


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"leading": ""}])
def test_without_anything_to_contrast_it_is_the_neutral_query_and_the_cut(loaded, settings):
    model, processor = loaded
    neutral = build_inputs(processor, [picture()], NEUTRAL)
    query = QUERIES[0] if "alpha" in settings else NEUTRAL
    with torch.no_grad():
        plain = model(**neutral, logits_to_keep=1).logits[:, -1]
        with lmmhooks.wrap(model, Lqcd(beta=0.2, **settings), processor=processor):
            out = model(**build_inputs(processor, [picture()], query), logits_to_keep=1).logits[:, -1]
    assert torch.equal(out.isfinite(), plain >= plain.amax() + math.log(0.2))
    torch.testing.assert_close(out[out.isfinite()], plain[out.isfinite()], atol=TOLERANCE, rtol=0)


def test_exchanging_the_branches_is_the_same_function():
    """``(1 + a) N - a L`` is ``(1 + b) L - b N`` with ``b = -(1 + a)``."""
    neutral, leading = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    ours = Lqcd(alpha=0.7, beta=0.0).combine(neutral, [leading], 0, None)
    b = -(1 + 0.7)
    torch.testing.assert_close(ours, (1 + b) * leading - b * neutral)


def test_the_contrast_scales_with_how_strongly_a_query_leads(loaded):
    model, processor = loaded
    queries = [*QUERIES, f"I think there is one. {NEUTRAL}"]
    rows = {}
    for sentiment, alpha in ((True, 1.0), (False, 1.0), (False, 0.7)):
        with (
            torch.no_grad(),
            lmmhooks.wrap(model, Lqcd(alpha=alpha, beta=0.0, sentiment=sentiment), processor=processor),
        ):
            rows[sentiment, alpha] = model(**batch(processor, queries), logits_to_keep=1).logits[:, -1]
    with torch.no_grad():
        plain = model(**build_inputs(processor, [picture()], NEUTRAL), logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(rows[True, 1.0][0], rows[False, 1.0][0])  # certainty: 1
    torch.testing.assert_close(rows[True, 1.0][1], plain, atol=TOLERANCE, rtol=0)  # neutral: 0
    torch.testing.assert_close(rows[True, 1.0][2], rows[False, 0.7][2], atol=TOLERANCE, rtol=0)  # opinion: 0.7


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "neutral", "leads"),
    [
        ("Is there a dog in the image?", "Is there a dog in the image?", 0.0),
        ("Is the left cup red, or is it blue?", "Is the left cup red, or is it blue?", 0.0),
        ("I think the answer is no. Is there a dog in the image?", "Is there a dog in the image?", 0.7),
        ("Is there a dog in the image? I'm absolutely sure there is.", "Is there a dog in the image?", 1.0),
        ("Is there a dog? In my opinion there is. What colour is it?", "Is there a dog? What colour is it?", 0.7),
        ("There is a dog in the image, isn't there?", "There is a dog in the image?", 0.5),
        ("I think there is a dog, right?", "there is a dog?", 0.7),
        ("I do not think that there is a dog in the image.", "there is a dog in the image.", 0.7),
        ("Obviously there is a dog, don't you agree?", "there is a dog?", 1.0),
        ("I believe so.", "I believe so.", 0.0),
    ],
)
def test_neutral_wordings(query, neutral, leads):
    assert neutralised(query) == neutral
    assert strength(query) == leads


def test_tokens_that_are_blank_without_a_stretch_go_with_it():
    texts = ["Is", " it", "?", " I", " think", " so", "."]
    assert without_spans(texts, [(7, 18)]) == [True, True, True, False, False, False, False]
    assert without_spans(texts, [(6, 18)]) == [True, True, True, False, False, False, False]
    assert without_spans(texts, []) == [True] * 7


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"leading": 5}, {"sentiment": True, "neutralise": False}, {"beta": -1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"lqcd: {next(iter(settings))}="):
        Lqcd(**settings)


def test_wordings_need_a_processor():
    with pytest.raises(MethodError, match="needs the model's tokenizer"):
        lmmhooks.wrap(build("llava").model, "lqcd")
