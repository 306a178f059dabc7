"""What an answer put together from several generations took, counted by the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.answering import AnswerMethod, Ask
from lmmhooks.prompting import Prompter

TOKENS = 64


@dataclass(frozen=True)
class Twice(AnswerMethod):
    """Asks two things at once, then one."""

    id: ClassVar[str] = "twice"
    paper: ClassVar[str] = "none"

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        first = ask(image, [prompt, f"{prompt} Now."], max_new_tokens=4)
        second = ask(image, [first[0].text or "What?"], max_new_tokens=1, starts=[40])
        object.__setattr__(self, "replies", [*first, *second])
        return second[0].text


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def loaded(request):
    return lmmhooks.load(request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 255, (112, 112, 3), generator=generator, dtype=torch.uint8).numpy())


def test_cost_adds_up_passes(loaded, image):
    model, processor = loaded
    method = Twice()
    question = "Is there a red circle?"
    with lmmhooks.wrap(model, method, processor=processor) as patch:
        assert patch.puts_answers_together
        patch.answer(image, question)
        cost, [bound] = patch.answer_cost, patch.methods
        replies = bound.replies
        plain = lmmhooks.cost.dense_counts
    assert (cost.passes, cost.replies) == (2, 3)
    assert cost.visual_tokens == 3 * TOKENS
    assert cost.visual_kept == [3 * TOKENS] * 8
    assert cost.new_tokens == sum(len(reply.tokens) for reply in replies)
    assert cost.steps == max(len(reply.tokens) for reply in replies[:2]) + 1
    prompts = [question, f"{question} Now.", replies[0].text or "What?"]
    lengths = [Prompter(processor).inputs([[image]], [text])["input_ids"].shape[1] for text in prompts]
    assert cost.prompt_tokens == sum(lengths) + 1, "the token that a reply is made to start with is read"
    shape = lmmhooks.cost.DecoderShape.from_config(model.config)
    read = [*lengths[:2], lengths[2] + 1]
    flops = [2 * lmmhooks.cost.prefill_macs(shape, plain(length - TOKENS, [TOKENS] * 8)) for length in read]
    assert cost.prefill_flops == pytest.approx(sum(flops))
    assert cost.prefill_ms > 0
    assert cost.preprocess_ms > 0
    assert cost.kv_bytes is not None
    assert len(cost.kv_bytes) == 8


def test_cost_is_that_of_the_newest_answer_and_follows_reduction(loaded, image):
    model, processor = loaded
    with lmmhooks.wrap(model, "random(keep=16)", Twice(), processor=processor) as patch:
        patch.answer(image, "Is there a red circle?")
        first = patch.answer_cost
        patch.answer(None, "Hello?", max_new_tokens=2)
        second = patch.answer_cost
    assert first.visual_tokens == 3 * TOKENS
    assert first.visual_kept == [3 * 16] * 8
    assert (second.passes, second.replies, second.visual_tokens) == (1, 1, 0)
    assert 1 <= second.new_tokens <= 2


def test_without_such_a_method_there_is_no_such_cost(loaded):
    model, processor = loaded
    with lmmhooks.wrap(model, "decoding-identity", processor=processor) as patch:
        assert not patch.puts_answers_together
        with pytest.raises(MethodError, match=r"patch\.stats"):
            patch.answer_cost  # noqa: B018 - reading it is the test


def test_a_system_message_reaches_every_prompt(loaded, image, monkeypatch):
    model, processor = loaded
    seen = []
    batch = Prompter.batch
    monkeypatch.setattr(
        Prompter, "batch", lambda self, prompts, images: seen.extend(prompts) or batch(self, prompts, images)
    )
    with lmmhooks.wrap(model, Twice(), processor=processor) as patch:
        patch.answer(image, "Is it red?", prompter=Prompter(processor, system="Be brief."))
    assert len(seen) == 3
    assert all("Be brief." in prompt for prompt in seen)
