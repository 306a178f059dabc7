"""
Random transforms of images on tensors, as torchvision makes them of PIL images.

Every function takes RGB in [0, 1], ``[n, 3, H, W]`` (crops or frames, all transformed alike), and draws its parameters
from a generator on the CPU, so that every device sees the same image. Shapes stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

__all__ = ["TRANSFORMS", "Transform"]

Transform = Callable[[Tensor, Generator], tuple[Tensor, dict[str, Any]]]
"""Pixels and a generator to pixels and the parameters that were drawn."""

#: Shares of red, green and blue in brightness (ITU-R 601).
_LUMA = (0.299, 0.587, 0.114)


def uniform(low: float, high: float, generator: Generator) -> float:
    """One number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def horizontal_flip(rgb: Tensor, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
    """Left and right exchanged."""
    return rgb.flip(-1), {}


def vertical_flip(rgb: Tensor, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
    """Top and bottom exchanged."""
    return rgb.flip(-2), {}


def rotation(rgb: Tensor, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
    """Turned about the centre by up to half a turn either way, nearest pixels, black where nothing was."""
    angle = uniform(-180.0, 180.0, generator)
    return rotated(rgb, angle), {"angle": angle}


def rotated(rgb: Tensor, angle: float) -> Tensor:
    """Turned counter-clockwise by ``angle`` degrees about the centre, the size kept."""
    height, width = rgb.shape[-2:]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # From output to input in units of half the width and half the height; y points down.
    matrix = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], device=rgb.device)
    grid = functional.affine_grid(matrix.expand(len(rgb), 2, 3), list(rgb.shape), align_corners=False)
    return functional.grid_sample(rgb, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def color_jitter(rgb: Tensor, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
    """Brightness, contrast and saturation by factors in [0, 2], hue by up to half the circle, in random order."""
    order = torch.randperm(4, generator=generator).tolist()
    drawn = {name: uniform(0.0, 2.0, generator) for name in ("brightness", "contrast", "saturation")}
    drawn["hue"] = uniform(-0.5, 0.5, generator)
    changes = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
    for place in order:
        rgb = changes[place](rgb, list(drawn.values())[place])
    return rgb, {**drawn, "order": [list(drawn)[place] for place in order]}


def adjust_brightness(rgb: Tensor, factor: float) -> Tensor:
    """0: black, 1: as it is."""
    return (factor * rgb).clamp(0, 1)


def adjust_contrast(rgb: Tensor, factor: float) -> Tensor:
    """0: the mean grey of each image, 1: as it is."""
    mean = gray(rgb).mean(dim=(-3, -2, -1), keepdim=True)
    return (factor * rgb + (1 - factor) * mean).clamp(0, 1)


def adjust_saturation(rgb: Tensor, factor: float) -> Tensor:
    """0: grey, 1: as it is."""
    return (factor * rgb + (1 - factor) * gray(rgb)).clamp(0, 1)


def gray(rgb: Tensor) -> Tensor:
    """``[n, 1, H, W]`` brightness."""
    return (rgb * torch.tensor(_LUMA, device=rgb.device)[:, None, None]).sum(dim=-3, keepdim=True)


def adjust_hue(rgb: Tensor, shift: float) -> Tensor:
    """Hue turned by a share of the circle; 0: as it is."""
    value, low = rgb.amax(dim=-3), rgb.amin(dim=-3)
    chroma = value - low
    red, green, blue = rgb.unbind(dim=-3)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (sector / 6 + shift) % 1.0
    # Of a hue, channel n is the value less its chroma times a trapezoid that is shifted from channel to channel.
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = (n + 6 * hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=-3)


def gaussian_blur(rgb: Tensor, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
    """A kernel of 13 pixels with a deviation in [1.5, 2]; edges are mirrored."""
    sigma = uniform(1.5, 2.0, generator)
    return blurred(rgb, 13, sigma), {"sigma": sigma}


def blurred(rgb: Tensor, size: int, sigma: float) -> Tensor:
    """Convolved with a Gaussian of ``size`` pixels (odd) and a deviation of ``sigma`` pixels."""
    reach = size // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=rgb.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    height, width = rgb.shape[-2:]
    # An image smaller than the kernel has not enough pixels to mirror.
    mode = "reflect" if min(height, width) > reach else "replicate"
    padded = functional.pad(rgb, (reach, reach, reach, reach), mode=mode).flatten(0, 1)[:, None]
    rows = functional.conv2d(padded, kernel.view(1, 1, -1, 1))
    return functional.conv2d(rows, kernel.view(1, 1, 1, -1))[:, 0].view_as(rgb)


def random_resized_crop(rgb: Tensor, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
    """A box of 8 to 100 % of the area with sides in a ratio of 3/4 to 4/3, scaled to the full size."""
    top, left, height, width = draw_box(rgb.shape[-2], rgb.shape[-1], generator)
    box = rgb[..., top : top + height, left : left + width]
    out = functional.interpolate(box, size=rgb.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    return out.clamp(0, 1), {"box": [top, left, height, width]}


def draw_box(height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width; after ten boxes that do not fit, the largest one in the middle that does."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * uniform(0.08, 1.0, generator)
        ratio = math.exp(uniform(math.log(low), math.log(high), generator))
        cols, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cols <= width and 0 < rows <= height:
            top = int(torch.randint(height - rows + 1, (), generator=generator))
            left = int(torch.randint(width - cols + 1, (), generator=generator))
            return top, left, rows, cols
    rows = min(height, round(width / low))
    cols = min(width, round(height * high))
    return (height - rows) // 2, (width - cols) // 2, rows, cols


#: By name, in the order of the release.
TRANSFORMS: dict[str, Transform] = {
    "horizontal_flip": horizontal_flip,
    "vertical_flip": vertical_flip,
    "rotation": rotation,
    "color_jitter": color_jitter,
    "gaussian_blur": gaussian_blur,
    "random_resized_crop": random_resized_crop,
}
