"""Tokenizers and chat templates of the bundled models."""

from __future__ import annotations

import numpy as np
import pytest

from lmmhooks_eval.tiny.batches import PromptPacker
from lmmhooks_eval.tiny.models import MODELS, VISUAL_TOKENS, prompt_layout
from lmmhooks_eval.tiny.processors import build_image_processor, build_processor
from lmmhooks_eval.tiny.questions import existence
from lmmhooks_eval.tiny.tokenizer import build_tokenizer, task_words

TOKENIZERS = {name: build_tokenizer(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_every_task_word_is_one_token(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    split = [
        form
        for word in task_words()
        for form in (word, " " + word)
        if len(tokenizer(form, add_special_tokens=False)["input_ids"]) != 1
    ]
    assert split == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", ["Is there a cup?", "  Zwölf Grüße, 你好 🙂\n\tx=3.14!", "supercalifragilistic"])
def test_any_text_survives_the_round_trip(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_prompts_read_as_documented() -> None:
    llava, qwen = (prompt_layout(name, TOKENIZERS[name]) for name in MODELS)
    assert llava.before + "Q" + llava.between + llava.answer_prefix + "Yes" + llava.end == (
        "USER: <image>\nQ ASSISTANT: Yes</s>"
    )
    assert qwen.before + "Q" + qwen.between + qwen.answer_prefix + "Yes" + qwen.end == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Q<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    )


@pytest.mark.parametrize("name", MODELS)
def test_processor_prompt_is_the_training_prompt(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    processor = build_processor(name, tokenizer, build_image_processor(name))
    question = existence("umbrella", True)
    content = [{"type": "image", "image": np.zeros((112, 112, 3), np.uint8)}, {"type": "text", "text": question.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    packer = PromptPacker(name, tokenizer)
    assert inputs["input_ids"][0].tolist() == packer.image_prefix + packer.encode(question)[0]
    assert packer.image_prefix.count(processor.image_token_id) == VISUAL_TOKENS


@pytest.mark.parametrize("name", MODELS)
def test_conversation_renders_the_answer_as_trained(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    layout = prompt_layout(name, tokenizer)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.rstrip() == layout.before + "Q" + layout.between + layout.answer_prefix + "Yes" + layout.end
