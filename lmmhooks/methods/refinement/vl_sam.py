"""
VL-SAM: trace the words of an answer back through all layers to the image, and look closer at what they came from.

The model names things; attention flow, from the token of each through every layer (see
`lmmhooks.methods.refinement.flow`), is a map of the image. Its largest blob is the positive region, the maximum inside
it a positive point and the minimum of the rest a negative one. SAM, where weights are given, segments from that pair,
then from the pair with its own mask, then from a new pair inside that mask. The box around what was found is cut out.

No code is published, and only restatements of the paper were at hand: all details are UNVERIFIED. The paper detects
objects; that its region is shown beside the image to answer a question is ours. Left out: pooling ten questions, the
four corner views, and merging masks of many objects; replies are greedy where the paper samples with top-p 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement import segmenting
from lmmhooks.methods.refinement.base import Look, LookAgain
from lmmhooks.methods.refinement.flow import REGULARISE, flow_rows, head_weights, weighted_mean
from lmmhooks.methods.refinement.operators import cropped
from lmmhooks.methods.refinement.regions import box_of
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.words import content_pieces, listed_words

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Pair", "Segmenter", "VlSam", "load_sam", "point_pair", "positive_region"]

Box = tuple[float, float, float, float]


def positive_region(grid: Tensor, above: float = 1.0) -> np.ndarray:
    """
    The largest blob of a map.

    Parameters
    ----------
    grid
        ``[rows, columns]``.
    above
        Multiple of the mean that cells of a blob exceed.

    Returns
    -------
    ndarray
        Bool ``[rows, columns]``: the 4-connected component of most cells, the first of several; where no cell exceeds
        the threshold, the largest cell.
    """
    values = grid.double().numpy()
    labels, found = ndimage.label(values > above * values.mean())
    if not found:
        return np.arange(values.size).reshape(values.shape) == values.argmax()
    return labels == np.bincount(labels.ravel())[1:].argmax() + 1


@dataclass(frozen=True)
class Pair:
    """A point inside a region and one outside, as row and column of a grid; None where everything is inside."""

    positive: tuple[int, int]
    negative: tuple[int, int] | None


def point_pair(grid: Tensor, region: np.ndarray) -> Pair:
    """The maximum of a map ``[rows, columns]`` inside a region, and its minimum in the rest; the first of several."""
    values = grid.double().numpy()
    inside, outside = np.where(region, values, -np.inf), np.where(region, np.inf, values)
    row, column = divmod(int(inside.argmax()), values.shape[1])
    if region.all():
        return Pair((row, column), None)
    other_row, other_column = divmod(int(outside.argmin()), values.shape[1])
    return Pair((row, column), (other_row, other_column))


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A SAM model with its processor."""

    model: Any
    processor: Any

    @torch.no_grad()
    def refined(self, image: Image, grid: Tensor, box: Box, above: float) -> np.ndarray:
        """Bool ``[height, width]``: what SAM makes of a map ``[rows, columns]`` over a box of the image."""
        prepared = self.processor(image, return_tensors="pt")
        embedded = self.model.get_image_embeddings(prepared["pixel_values"])

        def predict(pair: Pair, previous: Tensor | None = None) -> tuple[np.ndarray, Tensor]:
            points = [place for place in (pair.positive, pair.negative) if place is not None]
            given = [list(center(place, grid.shape, box)) for place in points]
            inputs = self.processor(
                image, input_points=[[given]], input_labels=[[[1, 0][: len(points)]]], return_tensors="pt"
            )
            out = self.model(
                image_embeddings=embedded,
                input_points=inputs["input_points"].to(embedded.dtype),
                input_labels=inputs["input_labels"],
                input_masks=previous,
                multimask_output=False,
            )
            [mask] = self.processor.image_processor.post_process_masks(
                out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )
            return np.asarray(mask[0, 0], dtype=bool), out.pred_masks[:, 0]

        pair = point_pair(grid, positive_region(grid, above))
        mask, low = predict(pair)
        mask, _ = predict(pair, low)
        if (inside := on_grid(mask, grid.shape, box)).any():
            within = grid * torch.from_numpy(inside)
            mask, _ = predict(point_pair(within, positive_region(within, above)))
        return mask


def center(place: tuple[int, int], shape: tuple[int, ...], box: Box) -> tuple[float, float]:
    """x and y, in pixels, of the middle of a cell (row, column) of a grid over a box."""
    left, top, right, bottom = box
    return left + (place[1] + 0.5) / shape[1] * (right - left), top + (place[0] + 0.5) / shape[0] * (bottom - top)


def on_grid(mask: np.ndarray, shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Bool ``[rows, columns]``: cells of a grid over a box whose middle is in a mask ``[height, width]``."""
    out = np.zeros(shape, dtype=bool)
    for row, column in np.ndindex(*shape):
        x, y = center((row, column), shape, box)
        out[row, column] = 0 <= x < mask.shape[1] and 0 <= y < mask.shape[0] and mask[int(y), int(x)]
    return out


def load_sam(path: str) -> Segmenter:
    """A SAM model, as `lmmhooks.methods.refinement.segmenting.load_sam` loads it."""
    return Segmenter(*segmenting.load_sam(path))


@dataclass(frozen=True)
class VlSam(LookAgain):
    """Cut out what the words of an answer came from."""

    id: ClassVar[str] = "vl-sam"
    paper: ClassVar[str] = (
        "Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts, NeurIPS 2024, 2410.05963"
    )

    naming: str = setting(
        "", help="What the model is asked to name things, such as 'List all objects in the image.'; '': the question."
    )
    max_new_tokens: int = setting(32, help="Longest reply whose words are traced, in tokens, 1 or more.")
    regularise: str = setting(
        "layer", help="When columns that many rows see are damped: after every 'layer', once 'final', or 'none'."
    )
    above: float = setting(1.0, help="Multiple of the map's mean that a positive region exceeds, 0 or more (ours).")
    sam: str | None = setting(None, help="Folder or hub id of a SAM model that turns points into a mask. None: no SAM.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")
        self._require(self.regularise in REGULARISE, "regularise", f"one of {', '.join(REGULARISE)}")
        self._require(self.above >= 0, "above", "0 or more")

    def check(self, family: Any) -> None:
        if self.sam is not None:
            load_sam(self.sam)

    def gradient_layers(self, family: Any) -> tuple[int, ...]:
        return tuple(range(family.num_layers))

    def saliency(self, look: Look) -> Saliency:
        prompt = self.naming or look.prompt
        reply = look.tell(prompt, max_new_tokens=self.max_new_tokens, do_sample=False)
        named = content_pieces(reply.pieces, listed_words)
        # An answer such as "Yes." has no content word; then all that is text counts.
        wanted = [place for place, piece in enumerate(reply.pieces) if (named[place] if any(named) else piece.strip())]
        if not wanted:
            return self._placed(look, torch.zeros(look.geometry.num_tokens))
        folded, positions = look.matrices(
            prompt, reply.tokens, lambda attention: weighted_mean(attention[None], head_weights(attention[None]))
        )
        first = folded.shape[1] - len(reply.tokens)
        rows = flow_rows(list(folded), [first + place for place in wanted], self.regularise)
        return self._placed(look, rows[:, positions].mean(dim=0))

    def refined(self, image: Image, saliency: Saliency) -> Image:
        grid, box = saliency.grid()
        if self.sam is not None:
            mask = load_sam(self.sam).refined(image, grid, box, self.above)
            if (found := box_of(mask)) is not None:
                return cropped(image, found)
        left, top, right, bottom = box_of(positive_region(grid, self.above)) or (0, 0, *grid.shape[::-1])
        wide, high = (box[2] - box[0]) / grid.shape[1], (box[3] - box[1]) / grid.shape[0]
        around = (box[0] + left * wide, box[1] + top * high, box[0] + right * wide, box[1] + bottom * high)
        # Cells may reach into what the processor pads.
        return cropped(
            image,
            (max(around[0], 0.0), max(around[1], 0.0), min(around[2], image.width), min(around[3], image.height)),
        )
