"""What a decoding method may know while it makes the prompts and images of its branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lmmhooks.errors import PromptError

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.decoding.view import ImageView

__all__ = ["CLIP_MEAN", "CLIP_STD", "BranchContext", "token_ids", "tokenizer_of"]

#: What pixels of LLaVA and Qwen-VL are normalised by; assumed where no processor says otherwise.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class BranchContext:
    """
    The surroundings of one image, or of one row of a prompt, in one branch.

    Attributes
    ----------
    family
        The model family.
    processor
        That was given to ``wrap``; None without one.
    index
        Which image of the encoder call, or which row of the prompt.
    memory
        Of the prompt, the very dictionary that `StepView.memory` is; images have none, for they are encoded before.
    image
        What is known of the image, for branches that read after the main one; None for the others.
    crop
        Which crop of that image the first of the given pixels are; more follow in order.
    notes
        What is worth knowing afterwards (the transform an image was given, the wording of a query), as mappings that
        JSON can hold; they end up in ``patch.stats.notes``.
    """

    family: Any
    processor: Any = None
    index: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    image: ImageView | None = None
    crop: int = 0

    @property
    def tokenizer(self) -> Any:
        """Of the processor; None without one."""
        return tokenizer_of(self.processor)

    def to_rgb(self, pixels: Tensor) -> Tensor:
        """Normalised pixels ``[..., 3, H, W]`` as RGB in [0, 1]."""
        mean, std = self._statistics(pixels)
        return (pixels * std + mean).clamp(0, 1)

    def from_rgb(self, rgb: Tensor) -> Tensor:
        """The inverse of `to_rgb`."""
        mean, std = self._statistics(rgb)
        return (rgb - mean) / std

    @property
    def knows_normalisation(self) -> bool:
        """Whether the processor says by what pixels are normalised; CLIP's mean and deviation are assumed if not."""
        return getattr(getattr(self.processor, "image_processor", None), "image_mean", None) is not None

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean: Sequence[float] = CLIP_MEAN
        std: Sequence[float] = CLIP_STD
        if self.knows_normalisation:
            mean, std = self.processor.image_processor.image_mean, self.processor.image_processor.image_std
        return tuple(torch.tensor(values, device=like.device)[:, None, None] for values in (mean, std))  # type: ignore[return-value]


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; None without one."""
    return getattr(processor, "tokenizer", None)


def token_ids(method: Any, text: str, processor: Any) -> list[int]:
    """
    Ids of a text without special tokens.

    Raises
    ------
    PromptError
        No tokenizer is known.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        raise PromptError(
            f"{method.id}: reading and writing text needs the model's tokenizer; "
            "give its processor to wrap(model, ..., processor=processor)"
        )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
