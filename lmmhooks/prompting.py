"""From an image and a question to model inputs, and from generated ids back to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from lmmhooks.errors import PromptError

__all__ = ["Prompter", "answer", "as_images", "build_inputs", "conversation", "decode_new", "open_image"]


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


@dataclass(frozen=True)
class Prompter:
    """
    How questions become inputs of a model.

    Attributes
    ----------
    processor
        Of the model, with a chat template.
    system
        System message put before every question; None for none.
    settings
        Image processor settings that replace its own.
    show
        What is made of every image before the image processor sees it (RGB in, RGB out); None: nothing.
    """

    processor: Any
    system: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[Image.Image], Image.Image] | None = None

    def render(self, num_images: int, question: str | Sequence[str], turns: Sequence[tuple[str, str]] = ()) -> str:
        """
        The prompt as the chat template writes it, up to where the answer begins.

        Parameters
        ----------
        num_images
            Images that the question is about.
        question
            The question, behind all images; or several texts, one behind each image.
        turns
            What was said before: questions without image, and their replies.

        Raises
        ------
        PromptError
            No processor, no chat template, an empty question, or texts that do not go with the images.
        """
        texts = [question] if isinstance(question, str) else list(question)
        if self.processor is None:
            raise PromptError("no processor is known for this model; pass processor=... to wrap()")
        if not "".join(texts).strip():
            raise PromptError("the prompt is empty; give a question")
        if getattr(self.processor, "chat_template", None) is None:
            raise PromptError(
                f"{type(self.processor).__name__} has no chat template to write the prompt with; set "
                "processor.chat_template, or build the inputs yourself and call model.generate"
            )
        if len(texts) > 1 and len(texts) != num_images:
            raise PromptError(f"{len(texts)} texts do not go with {num_images} images; give one text behind each image")
        written = self._written(conversation(num_images, question, self.system, turns))
        mark = getattr(self.processor, "image_token", None)
        if len(texts) > 1 and mark is not None and written.find(texts[0].strip()) > written.rfind(mark):
            # Templates like LLaVA's put all images first; its prompts with several mark their places in the text.
            marked = "".join(f"{mark}\n{text}" for text in texts)
            written = self._written(conversation(0, marked, self.system, turns))
        return written

    def _written(self, messages: list[dict[str, Any]]) -> str:
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def batch(self, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
        """
        The processor's tensors for rendered prompts, on the CPU, padded on the left.

        Parameters
        ----------
        prompts
            From `render`.
        images
            Of each prompt, in the order of their placeholders: PIL images or paths.

        Raises
        ------
        PromptError
            An image that cannot be read.
        """
        shown = [[self.shown(image) for image in row] for row in images]
        extra = {"images": shown, "images_kwargs": dict(self.settings)} if any(shown) else {}
        # A template that writes the start token itself must not get a second one; apply_chat_template decides the
        # same way.
        start = getattr(getattr(self.processor, "tokenizer", None), "bos_token", None)
        writes_start = start is not None and prompts[0].startswith(start)
        return self.processor(
            text=list(prompts),
            text_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": not writes_start},
            return_tensors="pt",
            **extra,
        )

    def inputs(
        self,
        images: Sequence[Sequence[Any]],
        questions: Sequence[str | Sequence[str]],
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        turns: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """
        Model inputs for several questions.

        Parameters
        ----------
        images
            Those of each question; may be none.
        questions
            As plain text; or for each several texts, one behind each of its images.
        device
            Where tensors go; None leaves them on the CPU.
        dtype
            Of floating-point tensors (pixels); None leaves them in float32.
        turns
            What was said before each of them: questions without image, and their replies.

        Raises
        ------
        PromptError
            As `render` and `batch`.
        """
        prompts = [self.render(len(shown), text, turns) for shown, text in zip(images, questions, strict=True)]
        return _placed(self.batch(prompts, images), device, dtype)

    def shown(self, image: Any) -> Image.Image:
        """An image (a PIL image or a path) as the image processor is given it, RGB."""
        opened = open_image(image)
        return opened if self.show is None else self.show(opened)


def conversation(
    num_images: int, question: str | Sequence[str], system: str | None = None, turns: Sequence[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """
    Chat messages that ask about some images, as ``processor.apply_chat_template`` takes them.

    Parameters
    ----------
    num_images
        Images; they stand before the question, or one before each of its texts.
    question
        A text, or as many as there are images.
    system
        A message put before everything.
    turns
        Questions without image that were asked before, and their replies.
    """
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": [_text(system)]})
    for asked, reply in turns:
        messages.append({"role": "user", "content": [_text(asked)]})
        messages.append({"role": "assistant", "content": [_text(reply)]})
    image = {"type": "image"}
    if isinstance(question, str):
        content = [*([image] * num_images), _text(question)]
    else:
        content = [part for text in question for part in (image, _text(text))]
    return [*messages, {"role": "user", "content": content}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


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
    device, dtype, turns
        As for `Prompter.inputs`.
    images_kwargs
        Settings of the image processor in the place of its own; None for none.

    Raises
    ------
    PromptError
        No processor, an empty prompt, or an image that cannot be read.
    """
    prompter = Prompter(processor, settings=images_kwargs or {})
    return prompter.inputs([images], [prompt], device, dtype, turns=turns)


def as_images(image: Any) -> list[Any]:
    """What was given as image of a question, as a list: empty for None."""
    return [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]


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


def answer(
    model: nn.Module,
    processor: Any,
    image: Any,
    prompt: str,
    *,
    prompter: Prompter | None = None,
    **generate_kwargs: Any,
) -> str:
    """Answer a question about an image (or several, or none); see `lmmhooks.patch.Patch.answer`."""
    prompter = Prompter(processor) if prompter is None else prompter
    weight = next(model.parameters())
    inputs = prompter.inputs([as_images(image)], [prompt], weight.device, weight.dtype)
    with torch.inference_mode():
        sequences = model.generate(**inputs, **generate_kwargs)  # type: ignore[operator] # GenerationMixin
    return decode_new(prompter.processor, sequences, inputs["input_ids"].shape[1])[0]
