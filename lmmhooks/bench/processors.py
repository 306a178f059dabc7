"""
Processors for named shapes, which have no files: image processors of the families, and a tokenizer of numbered words.

Words are one token each, as common words are in a real tokenizer, and different words are different tokens: passes
whose questions differ must not be taken for the same.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from transformers import PreTrainedModel

from lmmhooks.errors import LmmhooksError
from lmmhooks.methods.refinement.base import NEUTRAL, SHORT_ANSWER

__all__ = ["build_processor", "question"]

#: Different words that a question may have.
NUM_WORDS = 1024


def question(tokens: int) -> str:
    """A question of so many words."""
    return " ".join(f"w{number % NUM_WORDS}" for number in range(tokens))


def build_processor(model: PreTrainedModel) -> Any:
    """
    A processor whose prompts fit a model of a named shape.

    Parameters
    ----------
    model
        LLaVA or Qwen-VL; its configuration says what images it takes.

    Raises
    ------
    LmmhooksError
        Another family.
    """
    config: Any = model.config
    if config.model_type == "llava":
        from transformers import LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        side = config.vision_config.image_size
        tokenizer, template = _tokenizer({"<image>": config.image_token_index}, "<image>")
        prepare = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return LlavaProcessor(
            prepare,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        from lmmhooks.processors import image_only

        kinds = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}

        marks = {
            "<|image_pad|>": config.image_token_id,
            "<|video_pad|>": config.video_token_id,
            "<|vision_start|>": config.vision_start_token_id,
            "<|vision_end|>": config.vision_end_token_id,
        }
        tokenizer, template = _tokenizer(marks, "<|vision_start|><|image_pad|><|vision_end|>")
        vision = config.vision_config
        prepare = Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
        # By name: the order differs between the classes.
        parts = {"image_processor": prepare, "tokenizer": tokenizer, "video_processor": None}
        return image_only(kinds[config.model_type])(**parts, chat_template=template)
    raise LmmhooksError(
        f"no processor can be made for shapes of type {config.model_type!r}; methods that process the image again are "
        "measured on llava and qwen shapes, or on a checkpoint (--model)"
    )


def _tokenizer(marks: dict[str, int], image: str) -> tuple[Any, str]:
    """A tokenizer with these tokens at these ids, and a chat template that stands ``image`` before the question."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")
    texts = ("user assistant : yes no Yes No", NEUTRAL, SHORT_ANSWER, question(NUM_WORDS))
    pieces = [piece for text in texts for piece, _ in split.pre_tokenize_str(text) if piece.strip()]
    free = (number for number in count() if number not in marks.values())
    words = dict(zip(dict.fromkeys(["<unk>", "<s>", "</s>", *pieces]), free, strict=False))
    tokenizer = Tokenizer(models.WordLevel(words | marks, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+"), "removed"), split])
    named = {"image_token": next(iter(marks))}
    template = (
        "<s>user:{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
        + image
        + "{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %} assistant:"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=named,
        additional_special_tokens=list(marks),
        chat_template=template,
    ), template
