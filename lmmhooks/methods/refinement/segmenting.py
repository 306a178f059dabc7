"""Masks from SAM (segment anything), where weights are given."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage

from lmmhooks.errors import MethodError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["load_sam", "segment", "without_specks"]

#: Longer side at which SAM sees images, and at which sizes of specks are given.
SAM_SIZE = 1024


@lru_cache(maxsize=1)
def load_sam(path: str) -> tuple[Any, Any]:
    """
    A SAM model and its processor from a folder or the hub, loaded once, on the CPU.

    Raises
    ------
    MethodError
        It cannot be loaded.
    """
    from transformers import SamModel, SamProcessor

    try:
        return SamModel.from_pretrained(path, dtype=torch.float32).eval(), SamProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MethodError(
            f"sam={path!r} cannot be loaded ({reason}); give the folder or hub id of a SAM model"
        ) from None


@torch.no_grad()
def segment(image: Image, box: tuple[int, int, int, int], path: str) -> np.ndarray:
    """Bool ``[height, width]``: what SAM takes to be the thing in a box (left, top, right, bottom in pixels)."""
    model, processor = load_sam(path)
    inputs = processor(image, input_boxes=[[list(map(float, box))]], return_tensors="pt")
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    out = model(**{name: _as(value, model) for name, value in inputs.items()}, multimask_output=False)
    [masks] = processor.image_processor.post_process_masks(out.pred_masks, *sizes)
    return np.asarray(masks[0, 0], dtype=bool)


def without_specks(mask: np.ndarray, area: float) -> np.ndarray:
    """
    A mask without small holes, then without small islands; 8-connected.

    Parameters
    ----------
    mask
        Bool ``[height, width]``.
    area
        Pixels below which a hole or an island goes, of a picture with a longer side of 1024; the largest island stays.
    """
    least = area * (max(mask.shape) / SAM_SIZE) ** 2
    around = np.ones((3, 3), dtype=bool)
    holes, _ = ndimage.label(~mask, around)
    sizes = np.bincount(holes.ravel())
    sizes[0] = mask.size
    filled = mask | (sizes[holes] < least)
    islands, found = ndimage.label(filled, around)
    if not found:
        return filled
    sizes = np.bincount(islands.ravel())
    kept = sizes >= min(least, sizes[1:].max())
    kept[0] = False
    cleaned: np.ndarray = kept[islands]
    return cleaned


def _as(value: torch.Tensor, model: Any) -> torch.Tensor:
    return value.to(model.dtype) if value.is_floating_point() else value
