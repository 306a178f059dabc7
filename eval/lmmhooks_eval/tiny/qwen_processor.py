"""A Qwen2.5-VL processor for images alone, usable without torchvision."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLProcessor


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` whose ``video_processor`` may be None.

    The stock constructor insists on a video processor, whose only implementation needs torchvision. Everything else,
    including the class checks of the other parts, is inherited.
    """

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept None for the video processor; leave every other check to the base class."""
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)
