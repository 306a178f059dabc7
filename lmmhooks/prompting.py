"""From an image and a question to model inputs, and from generated ids back to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from lmmhooks.errors import PromptError

__all__ = ["answer", "as_images", "build_batch", "build_inputs", "decode_new", "open_image"]


def open_image(source: Any) -> Image.Image:
    """
    A PIL image in RGB, upright: what its Exif orientation says is done to its pixels, as transformers does on loading.

    Parameters
    ----------
    source
        A PIL image or a path.

    Raises
    ------
    PromptError
        The file does not exist or does not decode.
    """
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source).convert("RGB")
    if not isinstance(source, (str, Path)):
        raise PromptError(f"an image is a PIL image or a path, not {type(source).__name__}")
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise PromptError(f"image {str(source)!r} does not exist; check the path") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PromptError(f"image {str(source)!r} cannot be decoded ({reason}); save it again as PNG or JPEG") from None


def build_inputs(
    processor: Any,
    images: Sequence[Any],
    prompt: str | Sequence[str],
    device: Any = None,
    dtype: torch.dtype | None = None,
    *,
    turns: Sequence[tuple[str, str]] = (),
    images_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Model inputs for one question about some images, through the processor's chat template.

    Parameters
    ----------
    processor
        Processor of the model, with a chat template.
    images
        PIL images or paths, in the order in which they precede the question; may be empty.
    prompt
        The question; or several texts, one behind each image.
    device
        Where tensors go; None leaves them on the CPU.
    dtype
        Of floating-point tensors (pixels); None leaves them in float32.
    turns
        What was said before: questions without image, and their replies.
    images_kwargs
        Settings of the image processor in the place of its own; None for none.

    Raises
    ------
    PromptError
        No processor, an empty prompt, or an image that cannot be read.
    """
    opened, text = _rendered(processor, images, prompt, turns)
    extra = {"images_kwargs": dict(images_kwargs)} if images_kwargs and opened else {}
    inputs = processor(images=opened or None, text=[text], return_tensors="pt", **extra)
    return _placed(inputs, device, dtype)


def build_batch(
    processor: Any,
    images: Sequence[Sequence[Any]],
    prompts: Sequence[str],
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """
    Model inputs for several questions, padded on the left.

    Parameters
    ----------
    processor, device, dtype
        As for `build_inputs`.
    images
        Those of each question.
    prompts
        The questions.

    Raises
    ------
    PromptError
        As `build_inputs`.
    """
    rows = [_rendered(processor, shown, prompt) for shown, prompt in zip(images, prompts, strict=True)]
    shown = [opened for opened, _ in rows]
    extra = {"images": shown} if any(shown) else {}
    kwargs = {"padding": True, "padding_side": "left"}
    inputs = processor(text=[text for _, text in rows], text_kwargs=kwargs, return_tensors="pt", **extra)
    return _placed(inputs, device, dtype)


def as_images(image: Any) -> list[Any]:
    """What was given as image of a question, as a list: empty for None."""
    return [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]


def _rendered(
    processor: Any, images: Sequence[Any], prompt: str | Sequence[str], turns: Sequence[tuple[str, str]] = ()
) -> tuple[list[Image.Image], str]:
    """Opened images, and the prompt as the chat template writes it."""
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if processor is None:
        raise PromptError("no processor is known for this model; pass processor=... to wrap()")
    if not "".join(texts).strip():
        raise PromptError("the prompt is empty; give a question")
    if getattr(processor, "chat_template", None) is None:
        raise PromptError(
            f"{type(processor).__name__} has no chat template to write the prompt with; set processor.chat_template, "
            "or build the inputs yourself and call model.generate"
        )
    opened = [open_image(image) for image in images]
    if len(texts) == 1:
        return opened, _written(processor, turns, [{"type": "image"} for _ in opened] + [_text(texts[0])])
    if len(texts) != len(opened):
        raise PromptError(f"{len(texts)} texts do not go with {len(opened)} images; give one text behind each image")
    mixed = [part for text in texts for part in ({"type": "image"}, _text(text))]
    written = _written(processor, turns, mixed)
    mark = getattr(processor, "image_token", None)
    if mark is not None and written.find(texts[0].strip()) > written.rfind(mark):
        # Templates like LLaVA's put all images first; its prompts with several mark their places in the text.
        written = _written(processor, turns, [_text("".join(f"{mark}\n{text}" for text in texts))])
    return opened, written


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _written(processor: Any, turns: Sequence[tuple[str, str]], content: list[dict[str, str]]) -> str:
    """A conversation as the chat template writes it, up to where the next reply begins."""
    messages: list[dict[str, Any]] = []
    for question, reply in turns:
        messages.append({"role": "user", "content": [_text(question)]})
        messages.append({"role": "assistant", "content": [_text(reply)]})
    messages.append({"role": "user", "content": content})
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    return text


def _placed(inputs: Any, device: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    if device is not None:
        inputs = inputs.to(device)
    if dtype is None:
        return dict(inputs)
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def decode_new(processor: Any, sequences: torch.Tensor, prompt_length: int) -> list[str]:
    """Text of the new tokens of every row, special tokens left out, stripped."""
    new = sequences[:, prompt_length:]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def answer(model: nn.Module, processor: Any, image: Any, prompt: str, **generate_kwargs: Any) -> str:
    """Answer a question about an image (or several, or none); see `lmmhooks.patch.Patch.answer`."""
    images = as_images(image)
    weight = next(model.parameters())
    inputs = build_inputs(processor, images, prompt, weight.device, weight.dtype)
    with torch.inference_mode():
        sequences = model.generate(**inputs, **generate_kwargs)  # type: ignore[operator] # GenerationMixin
    return decode_new(processor, sequences, inputs["input_ids"].shape[1])[0]
