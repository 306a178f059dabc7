"""
FGVP (fine-grained visual prompting): keep a region sharp and blur everything else ("blur reverse mask").

Published for CLIP with masks from SAM; here a mask is the best regions of any method's map, the box of the caller
(``patch.answer(..., region=(left, top, right, bottom))``), or what SAM finds in the box around either (``sam``). What
is done to the picture is the released code's, to the grey levels; its radius is in pixels at the encoder's size and is
scaled to the image here. ``gray`` applies the weights of red and blue exchanged, as released (``luminance='rgb'`` does
not). There are no published figures of the method on models that answer in text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lmmhooks.geometry import CellGrid, Geometry
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement import operators
from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.nested import MapOfAnother
from lmmhooks.methods.refinement.regions import best_regions, box_of, number_kept, top_share
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.refinement.segmenting import load_sam, segment, without_specks
from lmmhooks.methods.refinement.softmask import placed, soft_mask

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Fgvp", "of_mask"]


def of_mask(mask: np.ndarray) -> Saliency:
    """A mask ``[height, width]`` as a map whose cells are pixels."""
    height, width = mask.shape
    cells = torch.arange(mask.size).reshape(height, width)
    grid = CellGrid(cells, (0.0, 0.0, float(width), float(height)), "image")
    return Saliency(torch.from_numpy(mask.astype(np.float64).ravel()), Geometry((width, height), mask.size, (grid,)))


@dataclass(frozen=True)
class Fgvp(MapOfAnother):
    """Blur, grey or tint what is not in the best regions."""

    id: ClassVar[str] = "fgvp"
    paper: ClassVar[str] = "Fine-Grained Visual Prompting, NeurIPS 2023, arXiv:2306.04356"
    code: ClassVar[str] = "https://github.com/ylingfeng/FGVP"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"carve": {"map": "carve"}}

    show: str = setting("refined", help="Pictures of the second answer: 'refined' (released), or 'both'.")
    operator: str = setting(
        "blur",
        help="Outside the region 'blur', 'gray' or 'reverse' (a flat colour mixed in); 'mask': the colour inside it; "
        "'contour': its outline drawn.",
    )
    soft: bool = setting(False, help="With 'blur' and 'gray': fade by the smoothed map instead of cutting out regions.")
    share: float = setting(0.2, help="Share of pixels that can be of a region, in (0, 1] (CARVE's).")
    num_regions: int = setting(3, help="Regions kept at least, 1 or more (CARVE's).")
    blur_radius: float = setting(100.0, help="Standard deviation in pixels at `encoder_size`, 0 or more; 0: no change.")
    encoder_size: int = setting(
        336, help="Longer side in pixels at which `blur_radius` holds, 1 or more (demo: 336, benchmark scripts: 384)."
    )
    alpha: float = setting(0.5, help="Share of the colour that is mixed in, in [0, 1].")
    colour: tuple[int, int, int] = setting((0, 255, 0), help="Of 'mask' and 'reverse': red, green, blue, 0 to 255.")
    line_colour: tuple[int, int, int] = setting((255, 0, 0), help="Of 'contour': red, green, blue, 0 to 255.")
    thickness: int = setting(2, help="Of 'contour', in pixels, 1 or more.")
    sam: str | None = setting(
        None, help="Folder or hub id of a SAM model that cuts out what is in the box of the region."
    )
    min_area: float = setting(
        400.0, help="With `sam`: holes and islands below this go, in pixels at a longer side of 1024, 0 or more."
    )
    luminance: str = setting("released", help="Weights of 'gray': 'released', red and blue exchanged, or 'rgb'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("blur", "gray", "reverse", "mask", "contour")
        self._require(self.operator in names, "operator", " or ".join(map(repr, names)))
        self._require(not self.soft or self.operator in ("blur", "gray"), "soft", "False but with 'blur' and 'gray'")
        self._require(0 < self.share <= 1, "share", "in (0, 1]")
        self._require(self.num_regions >= 1, "num_regions", "1 or more")
        self._require(self.blur_radius >= 0, "blur_radius", "0 or more")
        self._require(self.encoder_size >= 1, "encoder_size", "1 or more")
        self._require(0 <= self.alpha <= 1, "alpha", "in [0, 1]")
        for name in ("colour", "line_colour"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            self._require(len(value) == 3 and all(0 <= level <= 255 for level in value), name, "3 numbers in 0 to 255")
        self._require(self.thickness >= 1, "thickness", "1 or more")
        self._require(self.min_area >= 0, "min_area", "0 or more")
        self._require(self.luminance in operators.LUMINANCE, "luminance", "'released' or 'rgb'")

    def check(self, family: Any) -> None:
        super().check(family)
        if self.sam is not None:
            load_sam(self.sam)

    def saliency(self, look: Look) -> Saliency:
        if look.region is None:
            return super().saliency(look)
        left, top, right, bottom = (round(side) for side in look.region)
        mask = np.zeros((look.image.height, look.image.width), dtype=bool)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        return of_mask(mask)

    def mask(self, saliency: Saliency) -> np.ndarray:
        """Bool ``[height, width]``: the region."""
        plane = saliency.plane()
        if bool(((saliency.values == 0) | (saliency.values == 1)).all()):
            # A mask already: a threshold on ranks would cut through equal values.
            return plane.numpy() > 0.5
        top = top_share(plane, self.share)
        return best_regions(top, plane, number_kept(top, self.num_regions, self.share))

    def region(self, image: Image, saliency: Saliency) -> np.ndarray:
        """Bool ``[height, width]``: the region, or what SAM finds in the box around it."""
        mask = self.mask(saliency)
        if self.sam is None or (box := box_of(mask)) is None:
            return mask
        return without_specks(segment(image, box, self.sam), self.min_area)

    def refined(self, image: Image, saliency: Saliency) -> Image:
        if self.operator in ("blur", "gray"):
            mask = self._soft(saliency) or self.region(image, saliency)
            return operators.seen_through(image, self._behind(image), mask)
        mask = self.region(image, saliency)
        if self.operator == "contour":
            return operators.outlined(image, mask, self.line_colour, self.thickness)
        return operators.tinted(image, mask if self.operator == "mask" else ~mask, self.colour, self.alpha)

    def _behind(self, image: Image) -> Image:
        if self.operator == "gray":
            return operators.grayed(image, self.luminance)
        return operators.blurred(image, self.blur_radius * max(image.size) / self.encoder_size)

    def _soft(self, saliency: Saliency) -> Image | None:
        """Attention prompting's mask of the map, with the settings released there."""
        if not self.soft:
            return None
        grid, box = saliency.grid()
        return placed(soft_mask(grid, contrast=5.0, kernel=3), box, saliency.size)
