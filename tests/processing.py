"""Processors for the models of `tests.zoo`: the real ones of transformers, with a tokenizer of single characters."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import transformers
from packaging.version import Version
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lmmhooks.processors import image_only
from tests.zoo import FIRST_TEXT_ID, PINPOINTS

__all__ = ["processor_of"]

#: As numbered in `tests.zoo`.
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<video>", "<start>", "<end>", "<unk>")
_MARKS = {
    "image_token": "<image>",
    "context_image_token": "<image>",
    "video_token": "<video>",
    "start_image_token": "<start>",
    "end_image_token": "<end>",
    "vision_start_token": "<start>",
    "vision_end_token": "<end>",
}
_TEMPLATE = (
    "<s>{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)
_CLIP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {chr(32 + place): FIRST_TEXT_ID + place for place in range(95)}
    # Every other id that a model may say is a letter too.
    vocabulary |= {chr(0xC0 + place): FIRST_TEXT_ID + 95 + place for place in range(128 - FIRST_TEXT_ID - 95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=_MARKS,
        chat_template=template,
    )


@cache
def processor_of(family: str) -> Any:
    """A processor whose prompts and pixels fit the model that `tests.zoo.build` makes of a family."""
    mark = "<start><image><end>" if family.startswith("qwen") else "<image>"
    template = _TEMPLATE.replace("MARK", mark)
    tokenizer = _tokenizer(template)
    common: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": template}
    if family == "llava":
        prepare = CLIPImageProcessorPil(**_CLIP)
        return LlavaProcessor(
            prepare, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, **common
        )
    if family == "llava_next":
        prepare = LlavaNextImageProcessorPil(**_CLIP, image_grid_pinpoints=PINPOINTS)
        return LlavaNextProcessor(
            prepare, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, **common
        )
    if family == "llava_onevision":
        prepare = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS)
        return image_only(LlavaOnevisionProcessor)(
            prepare,
            video_processor=None,
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            **common,
        )
    if family == "internvl":
        if Version(transformers.__version__) < Version("5.20"):
            pytest.skip("InternVL's processor of older transformers counts patches of tensors with NumPy, which fails")
        prepare = GotOcr2ImageProcessorPil(
            size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
        )
        return image_only(InternVLProcessor)(prepare, video_processor=None, image_seq_length=4, **common)
    kinds = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
    prepare = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    return image_only(kinds[family])(prepare, video_processor=None, **common)
