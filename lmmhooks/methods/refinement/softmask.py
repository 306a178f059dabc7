"""
From attention over an answer to a mask that fades: what attention prompting (API) and AttWarp have in common.

The map is the attention of one layer to the image, renormalised within the image per head, mean over heads and over all
steps of a short greedy answer. API takes the softmax of the visual scores alone, AttWarp renormalises what the softmax
over all keys gives them: the same numbers. The mask is the map stretched to [0, 1], its contrast raised by a sigmoid,
smoothed, and brought to 8 bits and the size of the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as images
from torch import Tensor
from torch.nn import functional

from lmmhooks.geometry import Box
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import Look, LookAgain
from lmmhooks.methods.refinement.filters import SINK_FILTERS, content_steps, sinks, without
from lmmhooks.methods.refinement.saliency import Saliency

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["RESAMPLING", "AnswerMap", "placed", "smoothed", "soft_mask", "stretched", "within_image"]

RESAMPLING = {"lanczos": images.Resampling.LANCZOS, "bicubic": images.Resampling.BICUBIC}
#: Both release 20 of the 32 layers of LLaVA-1.5-7B; elsewhere the same share of the depth is taken.
SHARE_OF_DEPTH = 20 / 32


def within_image(rows: Tensor) -> Tensor:
    """Attention ``[T, H, n]`` renormalised per row, mean over heads and steps: ``[n]`` float64."""
    rows = rows.double()
    # The addend is AttWarp's; a row without any mass stays without.
    return (rows / (rows.sum(dim=-1, keepdim=True) + 1e-12)).mean(dim=(0, 1))


def stretched(values: Tensor) -> Tensor:
    """Least value to 0, largest to 1; all ones where all are equal (0 / 0 in released code)."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.ones_like(values)


def smoothed(values: Tensor, kernel: int) -> Tensor:
    """Mean of ``kernel x kernel`` cells of ``[rows, columns]``, the border repeated; float32."""
    padding = (kernel // 2,) * 4
    padded = functional.pad(values[None, None].float(), padding, mode="replicate")
    return functional.conv2d(padded, torch.ones(1, 1, kernel, kernel) / kernel**2)[0, 0]


def soft_mask(grid: Tensor, contrast: float, kernel: int) -> Tensor:
    """
    A map ``[rows, columns]`` with its contrast raised, smoothed.

    Parameters
    ----------
    grid
        The map; its scale and offset do not matter.
    contrast
        Factor of standard deviations (n - 1) before the sigmoid.
    kernel
        Cells per side that are averaged, odd.

    Returns
    -------
    Tensor
        float32 in [0, 1]; all ones for a map that is the same everywhere.
    """
    # In float32, like the released code: what is truncated to 8 bits later would differ by a level otherwise.
    shares = stretched(grid.float())
    if bool((shares == 1).all()):
        return shares
    centred = shares - shares.mean()
    return smoothed((contrast * (centred / centred.std())).sigmoid(), kernel)


def placed(mask: Tensor, box: Box, size: tuple[int, int], resampling: str = "lanczos") -> Image:
    """
    A mask ``[rows, columns]`` in [0, 1] as an 8-bit image of the size of a picture.

    Parameters
    ----------
    mask
        Truncated to 8 bits before it is enlarged.
    box
        What it covers, in pixels of the picture; 0 outside.
    size
        Width and height of the picture.
    resampling
        ``"lanczos"`` or ``"bicubic"``.
    """
    small = images.fromarray(mask.mul(255).byte().numpy())
    left, top, right, bottom = (round(side) for side in box)
    large = small.resize((max(right - left, 1), max(bottom - top, 1)), RESAMPLING[resampling])
    canvas = images.new("L", size, 0)
    canvas.paste(large, (left, top))
    return canvas


@dataclass(frozen=True)
class AnswerMap(LookAgain):
    """Makes a soft mask of the attention that a short answer pays to the image."""

    show: str = setting("refined", help="Pictures of the second answer: 'refined' (released), or 'both'.")
    layer: int | None = setting(
        None, help="Decoder layer that is read, 0-based; unset: 20 of 32 layers (released), elsewhere that share."
    )
    max_new_tokens: int = setting(20, help="Longest answer that is read, in tokens, 1 or more.")
    contrast: float = setting(5.0, help="Factor before the sigmoid that raises the contrast of the map, above 0.")
    kernel: int = setting(3, help="Cells per side over which the mask is smoothed, odd; 1: not.")
    resampling: str = setting("lanczos", help="How the mask is enlarged: 'lanczos' or 'bicubic'.")
    token_filter: str = setting(
        "none", help="Steps that are averaged: 'none' left out, or those of 'content' words (after RefAM, UNVERIFIED)."
    )
    sink_filter: str = setting(
        "none",
        help="Cells that most heads attend to: 'none', as they are; 'drop', to 0; 'median', to that of 3 x 3 cells.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.layer is None or self.layer >= 0, "layer", "0 or more, or unset")
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")
        self._require(self.contrast > 0, "contrast", "above 0")
        self._require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "odd, 1 or more")
        self._require(self.resampling in RESAMPLING, "resampling", "'lanczos' or 'bicubic'")
        self._require(self.token_filter in ("none", "content"), "token_filter", "'none' or 'content'")
        self._require(self.sink_filter in SINK_FILTERS, "sink_filter", "'none', 'drop' or 'median'")

    def check(self, family: Any) -> None:
        inside = self.layer is None or self.layer < family.num_layers
        self._require(inside, "layer", f"a layer of this model, 0 to {family.num_layers - 1}")

    def bind(self, family: Any) -> AnswerMap:
        return replace(self, layer=self._layer(family))

    def layers(self, family: Any) -> tuple[int, ...]:
        return (self._layer(family),)

    def saliency(self, look: Look) -> Saliency:
        seen = look.watch(look.prompt, max_new_tokens=self.max_new_tokens)
        rows = seen.rows[:, 0]
        if self.token_filter == "content":
            rows = rows[content_steps(seen.reply.pieces)]
        found = self._placed(look, within_image(rows))
        if self.sink_filter == "none":
            return found
        return without(found, sinks(seen.rows, seen.prompt_length), self.sink_filter)

    def mask(self, saliency: Saliency) -> Image:
        """8-bit, of the size of the image."""
        grid, box = saliency.grid()
        return placed(soft_mask(grid, self.contrast, self.kernel), box, saliency.size, self.resampling)

    def _layer(self, family: Any) -> int:
        return round(family.num_layers * SHARE_OF_DEPTH) if self.layer is None else self.layer
