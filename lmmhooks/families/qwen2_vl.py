"""
Qwen2-VL: patches of any resolution packed into one sequence, 2x2 merged in the tower, M-RoPE positions.

The tower's rows are ordered by merge group, so that the patches of one visual token are consecutive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import PromptError
from ..family import Family
from ..geometry import CellGrid, Size
from ..placing import whole
from ..smaller import nearest, resized
from ..vision import ImageTokens, VisionInputs

__all__ = ["Qwen2VLFamily"]


class Qwen2VLFamily(Family):
    """Qwen2-VL: every temporal patch of an image or video is a crop of ``(height / merge, width / merge)`` tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pixels_per_token = self.vision.spatial_merge_size * self.vision.config.patch_size

    def _grids(self, vision: VisionInputs) -> list[tuple[int, int, int]]:
        """``(frames, rows, columns)`` in tokens of every image of a call."""
        merge = self.vision.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in vision.host(f"{vision.modality}_grid_thw")]

    def crops_of(self, vision: VisionInputs) -> list[int]:
        return [frames for frames, _, _ in self._grids(vision)]

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens:
        if f"{vision.modality}_grid_thw" not in vision.kwargs:
            return ImageTokens.unknown(num_tokens)
        frames, rows, cols = self._grids(vision)[source]
        if frames * rows * cols != num_tokens:
            raise PromptError(
                f"{vision.modality} {source} has {num_tokens} tokens in the prompt, but its grid {frames} x {rows} x "
                f"{cols} gives {frames * rows * cols}; build the prompt with the processor of this model"
            )
        return ImageTokens.raster([(rows, cols)] * frames)

    def placing(self, tokens: ImageTokens, modality: str, size: Size, processor: Any) -> tuple[CellGrid, ...]:
        # Resized to a whole number of tokens each way, so that nothing is cut off or padded.
        width, height = size
        return whole(tokens, modality, (0.0, 0.0, float(width), float(height)))

    def tower_to_tokens(self, per_patch: Sequence[Tensor], vision: VisionInputs) -> list[Tensor]:
        # One piece per image or window, of different lengths.
        patches = torch.cat([piece.flatten(0, 1) for piece in per_patch])
        merged = patches.unflatten(0, (-1, self.vision.spatial_merge_size**2)).mean(dim=1)
        return list(self._raster(merged, vision).split([t * h * w for t, h, w in self._grids(vision)]))

    def unpack_pixels(self, vision: VisionInputs) -> list[Tensor]:
        merge, patch = self.vision.spatial_merge_size, self.vision.config.patch_size
        depth = self.vision.config.temporal_patch_size
        grids = self._grids(vision)
        sizes = [frames * rows * cols * merge**2 for frames, rows, cols in grids]
        images = []
        for patches, (frames, rows, cols) in zip(vision.kwargs[vision.pixels_name].split(sizes), grids, strict=True):
            cells = patches.reshape(frames, rows, cols, merge, merge, -1, depth, patch, patch)
            image = cells.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(
                frames, depth, -1, rows * merge * patch, cols * merge * patch
            )
            # A still image fills the temporal patch with copies of itself: hand it out once.
            still = bool((image == image[:, :1]).all())
            images.append(image[:, 0] if still else image.flatten(0, 1))
        return images

    def pack_pixels(self, images: Sequence[Tensor], vision: VisionInputs) -> Tensor:
        merge, patch = self.vision.spatial_merge_size, self.vision.config.patch_size
        depth = self.vision.config.temporal_patch_size
        packed = []
        for image, (frames, rows, cols) in zip(images, self._grids(vision), strict=True):
            copies = frames * depth // len(image)
            cells = image.repeat_interleave(copies, dim=0).reshape(
                frames, depth, -1, rows, merge, patch, cols, merge, patch
            )
            packed.append(cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(frames * rows * cols * merge**2, -1))
        return torch.cat(packed)

    def check_smaller(self) -> None:
        """Towers of this class take images of any size."""

    def token_grids(self, arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        return self._grids(_tower_call(arguments))

    def shrink(self, arguments: Mapping[str, Any], grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
        merge, patch = self.vision.spatial_merge_size, self.vision.config.patch_size
        given = arguments["grid_thw"]
        images = self.unpack_pixels(_tower_call(arguments))
        small = [
            resized(image, (rows * merge * patch, cols * merge * patch))
            for image, (rows, cols) in zip(images, grids, strict=True)
        ]
        sizes = torch.tensor([(rows * merge, cols * merge) for rows, cols in grids], device=given.device)
        shrunk = {**arguments, "grid_thw": torch.cat([given[:, :1], sizes.to(given.dtype)], dim=1)}
        return {**shrunk, "hidden_states": self.pack_pixels(small, _tower_call(shrunk))}

    def enlarge(self, output: Any, full: Sequence[tuple[int, int, int]], small: Sequence[tuple[int, int]]) -> Any:
        index, start = [], 0
        for (frames, rows, cols), grid in zip(full, small, strict=True):
            cells = nearest((rows, cols), grid)
            size = grid[0] * grid[1]
            index += [start + frame * size + cells for frame in range(frames)]
            start += frames * size
        spread = torch.cat(index).to(output.pooler_output.device)
        output.pooler_output = output.pooler_output[spread]
        if deepstack := getattr(output, "deepstack_features", None):
            output.deepstack_features = [features[spread] for features in deepstack]
        return output

    def _raster(self, merged: Tensor, vision: VisionInputs) -> Tensor:
        """Merged scores ``[tokens]`` from tower order to the order in which the merger hands them out."""
        return merged


def _tower_call(arguments: Mapping[str, Any]) -> VisionInputs:
    """A call of the tower as a call of the image encoder, which differs in the names of its arguments."""
    named = {"pixel_values": arguments["hidden_states"], "image_grid_thw": arguments["grid_thw"]}
    return VisionInputs("image", named, SimpleNamespace(pooler_output=[]))
