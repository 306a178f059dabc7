"""Processors of the bundled models, put together from PIL parts so that torchvision is not needed.

Both models get the PIL image processors on every machine: the pixels a model sees must not depend on whether
torchvision happens to be installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.tiny.models import CLIP_MEAN, CLIP_STD
from lmmhooks_eval.tiny.scenes import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


def build_image_processor(name: str) -> Any:
    """The PIL image processor of a bundled model; a 112 x 112 image passes unresized."""
    if name == "tiny-llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
        )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # A fixed pixel budget: the model was trained on 8 x 8 visual tokens only.
    pixels = IMAGE_SIZE * IMAGE_SIZE
    return Qwen2VLImageProcessorPil(
        patch_size=7,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


def build_processor(name: str, tokenizer: PreTrainedTokenizerBase, image_processor: Any) -> ProcessorMixin:
    """Join tokenizer and image processor.

    Parameters
    ----------
    name
        ``"tiny-llava"`` or ``"tiny-qwen"``.
    tokenizer
        Tokenizer with its chat template.
    image_processor
        See `build_image_processor`.

    Returns
    -------
    transformers.ProcessorMixin
        A `LlavaProcessor`, or a `Qwen2_5_VLProcessor` without video processor: handing it a video is an error.
    """
    if name == "tiny-llava":
        from transformers import LlavaProcessor

        return LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )

    from lmmhooks_eval.tiny.qwen_processor import ImageOnlyQwenProcessor

    return ImageOnlyQwenProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def save_processor(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write tokenizer, chat template and a ``processor_config.json`` that the stock `AutoProcessor` reads.

    The Qwen configuration names the stock video processor too, so that `AutoProcessor` works where torchvision is
    installed; `load_processor` works everywhere.
    """
    image_processor = build_image_processor(name)
    if name == "tiny-llava":
        build_processor(name, tokenizer, image_processor).save_pretrained(folder)
        return
    tokenizer.save_pretrained(folder)
    image = json.loads(image_processor.to_json_string())
    shared = ("patch_size", "merge_size", "temporal_patch_size", "size", "image_mean", "image_std")
    config = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": image,
        "video_processor": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            **{key: image[key] for key in shared},
        },
    }
    (folder / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
