"""Pixels of a scene: tinted textured background, silhouettes, sensor noise, 16 levels per channel."""

from __future__ import annotations

import numpy as np

from lmmhooks_eval.tiny.scenes import IMAGE_SIZE, Scene
from lmmhooks_eval.tiny.shapes import mask
from lmmhooks_eval.tiny.vocabulary import COLOURS

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "kitchen": (158, 136, 122),
    "street": (126, 128, 134),
    "beach": (168, 158, 124),
    "sky": (120, 142, 168),
}
"""Theme -> mean sRGB background."""
BACKGROUND_JITTER = 16.0
COLOUR_JITTER = 24.0
LEVEL_STEP = 16  # 16 levels per channel: lossless files of noisy images stay small (15 kB instead of 20 kB)
GRADIENT_STRENGTH = (0.0, 14.0)
TEXTURE_AMPLITUDE = (2.0, 12.0)
TEXTURE_PERIOD = (8.0, 40.0)  # pixels


def render(scene: Scene, rng: np.random.Generator, side: int = IMAGE_SIZE) -> np.ndarray:
    """Draw a scene.

    Parameters
    ----------
    scene
        What to draw.
    rng
        Source of texture, colour jitter and noise.
    side
        Side of the image, in pixels; texture and noise are of the same grain whatever it is.

    Returns
    -------
    numpy.ndarray
        uint8 ``(side, side, 3)``, sRGB; every value is a multiple of 16 plus 8.
    """
    base = np.asarray(BACKGROUNDS[scene.background], np.float32) + rng.uniform(-1, 1, 3) * BACKGROUND_JITTER
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = base.astype(np.float32)
    canvas += _texture(rng, side)[:, :, None]
    for item in scene.objects:
        colour = np.asarray(COLOURS[item.colour], np.float32)
        colour = colour + (rng.uniform(-1, 1, 3) * COLOUR_JITTER).astype(np.float32)
        rows, columns = slice(item.top, item.top + item.extent), slice(item.left, item.left + item.extent)
        opacity = (item.alpha * mask(item.category, item.extent))[:, :, None]
        canvas[rows, columns] += opacity * (colour - canvas[rows, columns])
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(scene.noise_sigma)
    levels = np.clip(canvas, 0.0, 255.0).astype(np.uint8)
    return (levels // LEVEL_STEP) * LEVEL_STEP + LEVEL_STEP // 2


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Two plane waves and a linear gradient, float32 ``(side, side)``, zero mean up to the waves' remainder."""
    axis = np.arange(side, dtype=np.float32)
    texture = np.zeros((side, side), np.float32)
    for _ in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wave_number = 2 * np.pi / rng.uniform(*TEXTURE_PERIOD)
        across = (wave_number * np.cos(angle) * axis).astype(np.float32)
        down = (wave_number * np.sin(angle) * axis + phase).astype(np.float32)
        # sin(a + b) from one-dimensional tables: the full-size sine would cost more than everything else here
        wave = np.outer(np.sin(down), np.cos(across)) + np.outer(np.cos(down), np.sin(across))
        texture += np.float32(rng.uniform(*TEXTURE_AMPLITUDE)) * wave
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(*GRADIENT_STRENGTH)
    ramp = (axis / (side - 1) * 2 - 1) * strength
    return texture + (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]).astype(np.float32)
