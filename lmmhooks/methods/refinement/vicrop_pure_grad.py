"""
ViCrop by pixel gradients: where the first answer token hangs on the pixels, at edges and textures alone.

The norm of the derivative of the most likely first token's log-probability by each pixel, over that under a neutral
prompt, is kept where the image has fine structure (a high-pass filter above its median) and averaged over the cells of
the visual tokens. It needs two passes backwards through the whole model and is the slowest form of ViCrop by far.

The paper has no neutral prompt here (UNVERIFIED, ``normalize=False``); the released code has, and is followed. It
filters the image stretched to a square, whatever the encoder was shown; here the part that the encoder sees is filtered
(``geometry='official'`` stretches). Models that see an image as several crops are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image as images
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from lmmhooks.errors import PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import NEUTRAL, SHORT_ANSWER, Look, neutral_prompt
from lmmhooks.methods.refinement.vicrop import ViCrop

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ViCropPixels", "high_pass", "per_cell"]


def high_pass(image: Image, size: tuple[int, int], median: int = 7, blur: int = 3) -> np.ndarray:
    """
    How much fine structure each pixel of an image has.

    Parameters
    ----------
    image
        RGB.
    size
        Width and height to which it is brought first (bilinear).
    median, blur
        Sides of the median filter and of the Gaussian kernel in pixels, odd. The kernel's standard deviation is
        ``0.15 blur + 0.35``, torchvision's default.

    Returns
    -------
    numpy.ndarray
        float32 ``[height, width]``: magnitude over channels of the image less its blurred self, median filtered.
    """
    pixels = np.asarray(image.resize(size, images.Resampling.BILINEAR), dtype=np.float32) / 255
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    places = torch.linspace(-(blur - 1) / 2, (blur - 1) / 2, blur)
    weights = (-0.5 * (places / (0.15 * blur + 0.35)) ** 2).exp()
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights[None]).expand(3, 1, blur, blur)
    padded = functional.pad(planes, (blur // 2,) * 4, mode="reflect")
    fine = (planes - functional.conv2d(padded, kernel, groups=3))[0].numpy()
    filtered: np.ndarray = ndimage.median_filter(np.sqrt(np.square(fine).sum(axis=0)), size=median)
    return filtered


def per_cell(pixels: Tensor, cells: tuple[int, int]) -> Tensor:
    """Means of ``[h, w]`` over the blocks of ``cells`` rows and columns; what is left over at right and bottom goes."""
    rows, columns = cells
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    return pixels[: rows * height, : columns * width].reshape(rows, height, columns, width).mean(dim=(1, 3))


@dataclass(frozen=True)
class ViCropPixels(ViCrop):
    """Cut out where the first answer token hangs on the pixels."""

    id: ClassVar[str] = "vicrop-pure-grad"

    normalize: bool = setting(True, help="Divide by the gradient under the neutral prompt (released).")
    median: int = setting(7, help="Side of the median filter, in pixels of the encoder's input, odd.")
    blur: int = setting(3, help="Side of the Gaussian kernel, in pixels of the encoder's input, odd.")
    neutral: str = setting(NEUTRAL, help="The neutral prompt.")
    suffix: str = setting(SHORT_ANSWER, help="Put behind it where the question ends with it; '' never.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("median", "blur"):
            value = getattr(self, name)
            self._require(value >= 1 and value % 2 == 1, name, "odd, 1 or more")

    def importance(self, look: Look) -> Tensor:
        question = self._norm(look, look.prompt)
        if self.normalize:
            prompt = neutral_prompt(look.prompt, self.neutral, self.suffix)
            key = look.digest(look.image), prompt
            if key not in look.memory:
                look.memory[key] = self._norm(look, prompt)
            question = (question / look.memory[key]).nan_to_num(nan=0.0, posinf=0.0)
        height, width = question.shape
        grid = look.geometry.grids[0]
        left, top, right, bottom = (round(side) for side in grid.box)
        part = look.image if self.geometry == "official" else look.image.crop((left, top, right, bottom))
        fine = high_pass(part, (width, height), self.median, self.blur)
        rows, columns = grid.index.shape
        means = per_cell(question * torch.from_numpy(fine > np.median(fine)), (rows, columns))
        values = torch.zeros(look.geometry.num_tokens)
        there = grid.index >= 0
        values[grid.index[there]] = means[there]
        return values

    def _norm(self, look: Look, prompt: str) -> Tensor:
        """Norm over channels of the derivative by each pixel: ``[h, w]`` float32."""
        parts = look.pixel_gradient(prompt)
        if len(look.geometry.grids) != 1:
            raise PromptError(
                f"{self.id} reads gradients of one picture, and this model sees an image of {look.image.width} x "
                f"{look.image.height} pixels as several crops; use vicrop-grad, which reads attention"
            )
        # A still image that fills several frames is one picture: what hangs on it is the sum.
        return torch.stack(parts).sum(dim=0).norm(dim=0)
