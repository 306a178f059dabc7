"""How a model takes its inputs: where pixels stand in the encoder's arguments, and how positions are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError
from .vision import VisionInputs

__all__ = ["ModelInputs"]


class ModelInputs:
    """Base of `lmmhooks.family.Family`: what has to be known to build the inputs of a model instead of reading them."""

    model: Any
    core: Any
    image_token_id: int
    video_token_id: int | None
    mrope: bool

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Ids that stand for visual features in a prompt, and those that open and close an image."""
        names = ("vision_start_token_id", "vision_end_token_id")
        marks = (getattr(self.model.config, name, None) for name in names)
        return tuple(i for i in (self.image_token_id, self.video_token_id, *marks) if isinstance(i, int))

    def unpack_pixels(self, vision: VisionInputs) -> list[Tensor]:
        """
        The images of an encoder call as ordinary pixels.

        Parameters
        ----------
        vision
            The call, before or after it was made: only its arguments are read.

        Returns
        -------
        list of Tensor
            Per image (per tile where the encoder sees tiles only) ``[crops or frames, C, H, W]``, normalised, without
            padding.
        """
        pixels = vision.kwargs[vision.pixels_name]
        if pixels.ndim == 4:
            return list(pixels.split(1))
        if pixels.ndim == 5:
            return list(pixels)
        raise ModelError(
            f"{vision.pixels_name} of model type {self.model.config.model_type!r} has shape {list(pixels.shape)}, "
            f"whose layout is not known; methods that change pixels need [images, C, H, W] or [images, crops, C, H, W]"
        )

    def pack_pixels(self, images: Sequence[Tensor], vision: VisionInputs) -> Tensor:
        """The inverse of `unpack_pixels`: pixels as the encoder takes them; padding stays as it was."""
        pixels = vision.kwargs[vision.pixels_name]
        return torch.cat(list(images)) if pixels.ndim == 4 else torch.stack(list(images))

    def position_ids(self, input_ids: Tensor, mask: Tensor, **vision: Any) -> Tensor:
        """
        Positions the model gives to prompts, for rows that must not depend on what the model remembers of others.

        Parameters
        ----------
        input_ids
            ``[B, N]``.
        mask
            ``[B, N]`` bool, False for padding.
        **vision
            What positions of images depend on, images in row order: ``image_grid_thw``, ``video_grid_thw``,
            ``second_per_grid_ts``.

        Returns
        -------
        Tensor
            ``[B, N]`` counting from 0 in every row, 0 at padding; with M-RoPE ``[4, B, N]``, that count first.
        """
        counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if not self.mrope:
            return counted
        kinds = torch.zeros_like(input_ids, dtype=torch.int)
        kinds[input_ids == self.image_token_id] = 1
        if self.video_token_id is not None:
            kinds[input_ids == self.video_token_id] = 2
        axes, _ = self.core.get_rope_index(input_ids, mm_token_type_ids=kinds, attention_mask=mask, **vision)
        return torch.cat([counted[None], axes.to(counted)])
