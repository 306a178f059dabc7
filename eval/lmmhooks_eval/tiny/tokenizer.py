"""Byte-level BPE tokenizers of the bundled models, and their chat templates.

The merges are learnt on the closed world's own sentences, so that every word of the task is one token, with and without
a leading space; any other text falls back to smaller pieces down to bytes and stays encodable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmmhooks_eval.tiny.vocabulary import CATEGORIES, COLOURS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEM_PROMPT = "You are a helpful assistant."
ANSWERS = ("Yes", "No", "Left", "Right", "0", "1", "2", "3", "The", *(name.capitalize() for name in COLOURS))
FRAME_WORDS = [
    "Is",
    "there",
    "a",
    "an",
    "in",
    "the",
    "image",
    "?",
    "What",
    "color",
    "is",
    "How",
    "many",
    "are",
    "Which",
    "side",
    "on",
    "left",
    "right",
    "of",
    "Describe",
    ".",
    ",",
    "and",
    "shows",
    "two",
    "three",
    "The",
    "this",
    "picture",
    "photo",
    "object",
    "objects",
    "not",
]
CHAT_WORDS = ("USER", "ASSISTANT", "system", "user", "assistant", *SYSTEM_PROMPT.replace(".", "").split())

LLAVA_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
QWEN_SPECIAL = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}

LLAVA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '</s>' -}}{%- else -%}{{- ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def task_words() -> tuple[str, ...]:
    """Every word that prompts, questions, answers and captions are made of."""
    nouns = [word for category in CATEGORIES for word in (category.name, category.plural)]
    return tuple(dict.fromkeys([*FRAME_WORDS, *ANSWERS, *CHAT_WORDS, *nouns, *COLOURS]))


def _corpus() -> Iterator[str]:
    for word in task_words():
        for _ in range(2):  # twice, to pass the trainer's minimum frequency
            yield word
            yield " " + word


def build_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a bundled model.

    Parameters
    ----------
    model
        ``"tiny-llava"`` (begins every text with ``<s>``) or ``"tiny-qwen"`` (no begin token, im_start/im_end layout).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = LLAVA_SPECIAL if model == "tiny-llava" else QWEN_SPECIAL
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # an upper bound that is never reached: merging ends when every word is one token
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special.values()),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    named = {key: value for key, value in special.items() if key in ("bos_token", "eos_token", "pad_token")}
    extra = {key: value for key, value in special.items() if key not in named}
    if "bos_token" in special:
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **named,
        extra_special_tokens=extra,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=LLAVA_TEMPLATE if model == "tiny-llava" else QWEN_TEMPLATE,
    )
