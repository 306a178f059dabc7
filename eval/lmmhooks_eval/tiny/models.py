"""Configurations of the bundled models: unmodified transformers classes, small enough to train on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.tiny.scenes import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MODELS = ("tiny-llava", "tiny-qwen")
GRID_SIDE = 8
"""Both models see the image as 8 x 8 visual tokens of 14 x 14 pixels."""
VISUAL_TOKENS = GRID_SIDE**2
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_MLP = 192, 8, 6, 512
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build a bundled model with random weights, float32.

    Parameters
    ----------
    name
        One of `MODELS`.
    tokenizer
        Its tokenizer; fixes the vocabulary size and the special token ids.

    Raises
    ------
    ValueError
        If the name is not one of `MODELS`.
    """
    if name == "tiny-llava":
        return _build_llava(tokenizer)
    if name == "tiny-qwen":
        return _build_qwen(tokenizer)
    raise ValueError(f"unknown bundled model {name!r}; choose one of {', '.join(MODELS)}")


def _ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _build_llava(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=14,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=384,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        num_key_value_heads=TEXT_HEADS,
        intermediate_size=TEXT_MLP,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(config)


def _build_qwen(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    start, end, image, video = _ids(tokenizer, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "num_heads": 4,
            "intermediate_size": 288,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": TEXT_WIDTH,
            "hidden_act": "silu",
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": TEXT_HEADS,
            "num_key_value_heads": 2,
            "intermediate_size": TEXT_MLP,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        tie_word_embeddings=True,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class PromptLayout:
    """How a bundled model's prompt is put together, as text around the question.

    Parameters
    ----------
    before
        Text before the question, holding one image token. Begin tokens are added by the tokenizer.
    before_without_image
        The same in the chat template's rendering of a message without an image.
    between
        Text between question and answer.
    answer_prefix
        Text that joins the answer to the prompt.
    end
        Token that ends the answer.
    """

    before: str
    before_without_image: str
    between: str
    answer_prefix: str
    end: str


def prompt_layout(name: str, tokenizer: PreTrainedTokenizerFast) -> PromptLayout:
    """Read the prompt layout off the chat template, so that training and inference cannot disagree."""
    marker = "QUESTION"
    text_part: dict[str, Any] = {"type": "text", "text": marker}

    def rendered(parts: list[dict[str, Any]]) -> str:
        messages = [{"role": "user", "content": parts}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    before, between = rendered([{"type": "image"}, text_part]).split(marker)
    before_without_image, _ = rendered([text_part]).split(marker)
    return PromptLayout(
        before=before,
        before_without_image=before_without_image,
        between=between,
        answer_prefix=" " if name == "tiny-llava" else "",
        end=tokenizer.eos_token,
    )
