"""
What can be done to a picture where a mask or a box says so; every method that makes pictures uses these.

Masks are bool ``[height, width]``, True where the picture matters, or 8-bit images of the same size where a method
blends. Pictures are RGB and are never changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as images
from PIL import ImageFilter
from scipy import ndimage

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LUMINANCE", "black", "blurred", "cropped", "fade", "grayed", "outlined", "seen_through", "tinted", "warped"]

#: OpenCV's 15-bit weights of R, G and B. ``"released"``: as FGVP's code applies them, red and blue exchanged.
LUMINANCE = {"released": (3735, 19235, 9798), "rgb": (9798, 19235, 3735)}

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


def cropped(image: Image, box: Box) -> Image:
    """A box (left, top, right, bottom in pixels, rounded half to even) cut from a picture; at least one pixel."""
    left, top, right, bottom = (round(side) for side in box)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def black(image: Image, mask: np.ndarray) -> Image:
    """Black outside the mask."""
    return images.fromarray(np.asarray(image) * mask[..., None].astype(np.uint8))


def fade(image: Image, mask: Image, background: float) -> Image:
    """
    A picture fading into a flat grey.

    Parameters
    ----------
    image
        RGB.
    mask
        8-bit, of the same size: 255 shows the picture, 0 the background.
    background
        Grey level, 0 to 255.
    """
    share = np.asarray(mask, dtype=np.float32)[..., None] / 255.0
    # float32 times image, float64 times background, then truncation: what decides single grey levels in released code.
    blend = np.asarray(image, dtype=np.float32) * share + (1 - share) * np.float64(background)
    return images.fromarray(blend.astype(np.uint8))


def blurred(image: Image, radius: float) -> Image:
    """Gaussian blur (extended box approximation); ``radius`` is the standard deviation in pixels, 0 changes nothing."""
    return image.filter(ImageFilter.GaussianBlur(radius)) if radius else image


def grayed(image: Image, luminance: str = "released") -> Image:
    """Luminance in all three channels, with the weights in `LUMINANCE`."""
    weights = np.array(LUMINANCE[luminance], dtype=np.int64)
    level = (np.asarray(image, dtype=np.int64) @ weights + (1 << 14)) >> 15
    return images.fromarray(np.repeat(level.astype(np.uint8)[..., None], 3, axis=2))


def tinted(image: Image, mask: np.ndarray, colour: Colour, alpha: float) -> Image:
    """``alpha`` parts of a flat colour, in [0, 1], mixed into a picture inside the mask; rounded half to even."""
    pixels = np.asarray(image)
    mixed = np.float32(alpha) * np.array(colour, dtype=np.float32) + np.float32(1 - alpha) * pixels
    return images.fromarray(np.where(mask[..., None], np.rint(mixed).clip(0, 255).astype(np.uint8), pixels))


def outlined(image: Image, mask: np.ndarray, colour: Colour, thickness: int = 2) -> Image:
    """
    The outlines of a mask drawn on a picture, holes too.

    An outline consists of the pixels of the mask beside others; a thickness above 1 widens it to both sides by half.
    OpenCV, which draws lines from corner to corner, may differ by single pixels (UNVERIFIED).
    """
    edge = mask & ~ndimage.binary_erosion(mask)
    if thickness > 1:
        edge = ndimage.binary_dilation(edge, iterations=thickness // 2)
    return images.fromarray(np.where(edge[..., None], np.array(colour, dtype=np.uint8), np.asarray(image)))


def seen_through(image: Image, behind: Image, mask: np.ndarray | Image) -> Image:
    """A picture where the mask is, another of the same size where it is not; 8-bit masks blend."""
    if isinstance(mask, np.ndarray):
        mask = images.fromarray(mask.astype(np.uint8) * 255)
    return images.composite(image, behind, mask)


def warped(image: Image, across: np.ndarray, down: np.ndarray) -> Image:
    """
    A picture sampled on a rectilinear grid.

    Parameters
    ----------
    image
        RGB.
    across, down
        ``[width]`` and ``[height]`` of the result: columns and rows of the picture, from 0, at which it is sampled;
        linear between pixels, the border repeated beyond.
    """
    # Like cv2.remap in float32, which is linear in one direction, then the other, and rounds once.
    pixels = _between(np.asarray(image, dtype=np.float32), across.astype(np.float32), axis=1)
    return images.fromarray(np.rint(_between(pixels, down.astype(np.float32), axis=0)).astype(np.uint8))


def _between(pixels: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along an axis."""
    last = pixels.shape[axis] - 1
    before = np.floor(places)
    share = (places - before).reshape([-1 if dim == axis else 1 for dim in range(3)])
    low = pixels.take(before.astype(np.int64).clip(0, last), axis=axis)
    high = pixels.take((before.astype(np.int64) + 1).clip(0, last), axis=axis)
    return low + share * (high - low)
