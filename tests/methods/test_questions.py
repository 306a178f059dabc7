"""The bare question of a prompt, with the tokenizers of the bundled models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lmmhooks
from lmmhooks.layout import Layout, Segment
from lmmhooks.methods.reduction.questions import ANSWER_FORMATS, asked, question_texts

METHOD = lmmhooks.method("mmtok", keep=4)
QUESTION = "What is the color of the two red circles?"


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def processor(request):
    return lmmhooks.load(request.param)[1]


def group(tokenizer, segments, ids):
    layout = Layout(torch.tensor(segments, dtype=torch.int8), ())
    return SimpleNamespace(tokenizer=tokenizer, layout=layout, input_ids=torch.tensor(ids))


def prompt(processor, question):
    """A chat prompt with one image, and the segment of every token."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    place = ids.index(processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    after = [Segment.INSTRUCTION] * (len(ids) - place - 1)
    return ids, [Segment.SYSTEM] * place + [Segment.VISUAL] + after


def test_the_template_is_left_out(processor):
    ids, segments = prompt(processor, QUESTION)
    assert question_texts(METHOD, group(processor.tokenizer, [segments], [ids])) == [QUESTION]


class Letters:
    """A tokenizer of one letter per id, without a chat template."""

    chat_template = None

    def decode(self, ids, **kwargs):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("answer_format", ["", *ANSWER_FORMATS])
def test_answer_formats_and_the_end_of_llava_prompts_are_left_out(answer_format):
    ids = [ord(letter) for letter in f"\n{QUESTION}\n{answer_format} ASSISTANT:"]
    (text,) = question_texts(METHOD, group(Letters(), [[Segment.INSTRUCTION] * len(ids)], [ids]))
    assert text == QUESTION


def test_text_before_the_image_speaks_where_none_comes_after():
    segments = [
        [Segment.PADDING, Segment.SYSTEM, Segment.VISUAL, Segment.INSTRUCTION],
        [Segment.SYSTEM, Segment.SYSTEM, Segment.VISUAL, Segment.VISUAL],
    ]
    found = asked(group(None, segments, [[0] * 4] * 2))
    assert found.tolist() == [[False, False, False, True], [True, True, False, False]]


def test_without_a_tokenizer_the_error_names_the_remedy():
    with pytest.raises(lmmhooks.PromptError, match=r"mmtok: .*processor=processor"):
        question_texts(METHOD, group(None, [[Segment.INSTRUCTION]], [[9]]))
