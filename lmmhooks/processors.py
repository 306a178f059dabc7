"""
Processors that work without torchvision.

Image processors of transformers have a PIL variant and choose it by themselves; video processors have none, and a
processor class that owns one cannot be constructed without torchvision even for images alone. Here such a class is put
together from its other parts.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from .errors import ModelError, PromptError

__all__ = ["load_processor"]


def load_processor(path: str, config: Any, **hub: Any) -> Any:
    """
    The processor of a checkpoint.

    Parameters
    ----------
    path
        Local folder or hub id.
    config
        Configuration of the model.
    hub
        Passed on to ``from_pretrained``: ``revision``.

    Returns
    -------
    transformers.ProcessorMixin
        The checkpoint's own class; without torchvision, where that class needs a video processor, a subclass of it that
        refuses videos. Its tokenizer pads on the left, which batched generation needs.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    hub = {"trust_remote_code": False, **hub}
    processor_class = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None or "video_processor" not in processor_class.get_attributes() or find_spec("torchvision"):
        processor = AutoProcessor.from_pretrained(path, **hub)
    else:
        processor = _without_videos(processor_class, path, hub)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"it holds a {type(processor).__name__} where a processor of images and text is needed")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        # A batch has to be padded with something; the mask hides it.
        tokenizer.pad_token = tokenizer.eos_token
    return processor


class _WithoutVideos:
    """Mixed into a processor class: its video processor may be missing, and videos are refused."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        if videos is not None:
            raise PromptError(
                "videos need torchvision, which is not installed; pip install torchvision, or pass images"
            )
        return super().__call__(images=images, text=text, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # What would be written is a processor whose video part is gone for everybody.
        raise ModelError(
            f"this {type(self).__name__} was loaded without its video processor, which saving would lose; "
            f"pip install torchvision and load it again, or copy the files it was loaded from"
        )


def _without_videos(processor_class: Any, path: str, hub: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    # Not from the package root: older versions put a placeholder there that insists on torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    attributes = processor_class.get_attributes()
    if unknown := set(attributes) - {*loaders, "video_processor"}:
        raise ValueError(f"its {processor_class.__name__} needs {', '.join(sorted(unknown))}; pip install torchvision")
    parts = [loaders[name].from_pretrained(path, **hub) if name in loaders else None for name in attributes]
    settings, _ = processor_class.get_processor_dict(path, **hub)
    return image_only(processor_class).from_args_and_dict(parts, settings)


def image_only(processor_class: Any) -> Any:
    """A processor class that can do without its video processor (None), and refuses videos."""
    # The same name: it is written into saved files, and transformers looks some behaviour up by it.
    return type(processor_class.__name__, (_WithoutVideos, processor_class), {"__module__": __name__})
