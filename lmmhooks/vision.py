"""What one call of the image or video encoder saw, and what the tokens that came out of it show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compat import pixels_argument

__all__ = ["ENCODERS", "PIXELS", "ImageTokens", "Tiling", "VisionInputs"]

#: Method of a multimodal model that encodes, by modality.
ENCODERS = {"image": "get_image_features", "video": "get_video_features"}

#: Argument that holds the pixels, by modality.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Tiling:
    """
    How the crops of one image belong together: one shows all of it, the others are its tiles.

    Attributes
    ----------
    overview
        Crop that shows the whole image scaled down.
    num_tiles
        The other crops, in raster order.
    grid
        Rows and columns of tiles; None where the model does not know them.
    """

    overview: int
    num_tiles: int
    grid: tuple[int, int] | None = None

    @property
    def tiles(self) -> list[int]:
        """Numbers of the crops that are tiles."""
        return [crop for crop in range(self.num_tiles + 1) if crop != self.overview]


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """
    Geometry of one image's (or video's) visual tokens, in sequence order.

    Attributes
    ----------
    crop
        Long ``[n]`` on the CPU: which crop of the image a token shows. Any-resolution models: 0 is the base (the whole
        image scaled down), tiles follow in raster order; InternVL: the tile, thumbnail last; video: the temporal index.
    row, col
        Long ``[n]`` on the CPU: the cell inside the grid of that crop. ``crop``, ``row`` and ``col`` are all -1 for
        tokens that show no place in the image (newline, separator, CLS), and for models whose token grid is unknown.
    grids
        ``(rows, columns)`` of every crop's full token grid, before any unpadding; empty if the grid is unknown.
    tiling
        Which crop is the whole image and which its tiles; None for single crops, frames and unknown geometry.
    """

    crop: Tensor
    row: Tensor
    col: Tensor
    grids: tuple[tuple[int, int], ...]
    tiling: Tiling | None = None

    def __len__(self) -> int:
        return self.crop.numel()

    @classmethod
    def raster(cls, grids: Sequence[tuple[int, int]]) -> ImageTokens:
        """All cells of all grids, row by row and grid after grid: the order of models without newline tokens."""
        parts = [
            torch.stack(torch.meshgrid(torch.tensor([crop]), torch.arange(h), torch.arange(w), indexing="ij")).flatten(
                1
            )
            for crop, (h, w) in enumerate(grids)
        ]
        crop, row, col = torch.cat(parts, dim=1) if parts else torch.empty(3, 0, dtype=torch.long)
        return cls(crop, row, col, tuple(grids))

    @classmethod
    def unknown(cls, num_tokens: int) -> ImageTokens:
        """Tokens without a known place in the image."""
        nowhere = torch.full((num_tokens,), -1)
        return cls(nowhere, nowhere, nowhere, ())

    def subset(self, index: Tensor) -> ImageTokens:
        """Geometry of the tokens at ``index`` (long or bool, CPU); the grids stay the full ones."""
        return ImageTokens(self.crop[index], self.row[index], self.col[index], self.grids, self.tiling)


@dataclass(eq=False)
class VisionInputs:
    """
    What one ``get_image_features`` or ``get_video_features`` call saw and returned.

    Attributes
    ----------
    modality
        ``"image"`` or ``"video"``.
    kwargs
        The call's arguments bound to their names: ``pixel_values``, ``image_grid_thw``, ``image_sizes`` ... Empty if
        the features were encoded earlier and handed to the model; some families then cannot place the tokens.
    output
        The ``ModelOutput`` it returned. ``output.pooler_output`` holds the features, an entry ``[n_i, D]`` per image in
        row order. Where ``generate`` encodes images ahead of its loop, it repeats the entries in place for beams; in
        older versions it repeats the pixels, and the call itself sees every copy.
    probes
        What vision probes read during the call: by probe name, one tensor per attention call in tower order.
    num_entries
        Entries at the time of the call, before any expansion.
    entries_per_image
        How many entries each image has, in order: more than one where the encoder sees an image as separate tiles
        (InternVL). Only the sequence tells, so `lmmhooks.layout.build_layout` fills it in; None until then.
    """

    modality: str
    kwargs: dict[str, Any]
    output: Any
    probes: dict[str, list[Tensor]] = field(default_factory=dict)
    num_entries: int = field(init=False)
    entries_per_image: tuple[int, ...] | None = field(default=None, init=False)
    _host: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_entries = len(self.lengths())

    @property
    def pixels_name(self) -> str:
        """Name of the argument that holds the pixels."""
        return pixels_argument(self.modality, self.kwargs)

    def lengths(self) -> list[int]:
        """Features of every entry now, after any expansion."""
        features = self.output.pooler_output
        if isinstance(features, Tensor):
            if features.ndim == 2:
                return [features.shape[0]]
            return [features.shape[1]] * features.shape[0]
        return [entry.shape[0] for entry in features]

    @property
    def num_images(self) -> int:
        """Images before any expansion; until a layout was built, every entry counts as one."""
        return self.num_entries if self.entries_per_image is None else len(self.entries_per_image)

    def host(self, name: str) -> list[Any]:
        """Argument ``name`` as nested Python lists; brought to the host once, however often it is asked for."""
        if name not in self._host:
            value = self.kwargs[name]
            self._host[name] = value.tolist() if hasattr(value, "tolist") else [list(item) for item in value]
        return self._host[name]
