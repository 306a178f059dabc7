"""How a vision tower is given a smaller image: its pixels, and where its features stand in the grid of the full one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError

__all__ = ["SmallerImages", "centres", "nearest", "resized"]

Grid = tuple[int, int]


def centres(size: int, count: int) -> Tensor:
    """Of ``size`` places in a line, the middle ones of ``count`` equal parts; long ``[count]``, strictly ascending."""
    # Integers throughout: (i + 0.5) * size / count, rounded down.
    return (2 * torch.arange(count) + 1) * size // (2 * count)


def nearest(full: Grid, small: Grid) -> Tensor:
    """
    For every cell of the full grid, the cell of the small one that stands for it.

    The small cells sit at `centres`, where each stands for itself; a tie goes to the upper left.

    Returns
    -------
    Tensor
        Long ``[rows * cols]`` on the CPU.
    """
    row, col = (
        (torch.arange(size)[:, None] - centres(size, count)[None]).abs().argmin(dim=1)
        for size, count in zip(full, small, strict=True)
    )
    return (row[:, None] * small[1] + col[None]).flatten()


class SmallerImages:
    """
    Base of `lmmhooks.family.Family`: running the tower on fewer pixels while the rest of the model sees the full grid.

    Towers here see crops ``[crops, channels, height, width]`` and hand out ``[crops, tokens, C]``.
    """

    model: Any
    vision: Any
    has_cls: bool

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a visual token, in the tower."""
        return 1

    def check_smaller(self) -> None:
        """
        Refuse towers that take one image size only.

        Raises
        ------
        ModelError
            With the reason.
        """
        if self._sizes()[2] is None:
            raise ModelError(
                f"the vision tower {type(self.vision).__name__} cannot be given smaller images: its position "
                "embeddings cannot be interpolated"
            )

    def token_grids(self, arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """
        Frames, rows and columns of the visual tokens that a call of the tower gives, per crop or image.

        Parameters
        ----------
        arguments
            Of the tower's forward, by name.
        """
        pixels, (patch_rows, patch_cols, _), unit = arguments["pixel_values"], self._sizes(), self.patches_per_side
        grid = (1, pixels.shape[-2] // patch_rows // unit, pixels.shape[-1] // patch_cols // unit)
        return [grid] * len(pixels)

    def shrink(self, arguments: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        """
        Arguments of the tower for smaller images.

        Parameters
        ----------
        arguments
            As given.
        grids
            Rows and columns of visual tokens wanted, per crop or image.
        """
        [(rows, cols)] = set(grids)
        patch_rows, patch_cols, extra = self._sizes()
        unit = self.patches_per_side
        size = rows * unit * patch_rows, cols * unit * patch_cols
        return {**arguments, **(extra or {}), "pixel_values": resized(arguments["pixel_values"], size)}

    def enlarge(self, output: Any, full: Sequence[tuple[int, int, int]], small: Sequence[Grid]) -> Any:
        """
        The tower's output with every patch of the full grid showing the patch of the small image that is nearest.

        Parameters
        ----------
        output
            Of the tower, changed in place.
        full
            What `token_grids` said of the images as given.
        small
            The grids it was run on.
        """
        unit, first = self.patches_per_side, int(self.has_cls)
        (_, rows, cols), (small_rows, small_cols) = full[0], small[0]
        tokens = nearest((rows, cols), (small_rows, small_cols)).view(rows, cols)
        # Patches inside a token keep their place in it.
        inner = torch.arange(unit)
        y = (tokens // small_cols)[:, None, :, None] * unit + inner[None, :, None, None]
        x = (tokens % small_cols)[:, None, :, None] * unit + inner[None, None, None, :]
        index = (y * (small_cols * unit) + x).expand(rows, unit, cols, unit).flatten() + first
        index = torch.cat([torch.arange(first), index])

        def spread(states: Tensor | None) -> Tensor | None:
            # The model asks the tower to record only the layers it takes.
            return None if states is None else states[:, index.to(states.device)]

        if output.hidden_states is not None:
            output.hidden_states = tuple(spread(states) for states in output.hidden_states)
        output.last_hidden_state = spread(output.last_hidden_state)
        return output

    def _sizes(self) -> tuple[int, int, dict[str, Any] | None]:
        """Height and width of a patch, and the arguments that make positions interpolate; None where they cannot."""
        config = self.vision.config
        patch = config.patch_size
        rows, cols = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        if "interpolate_pos_encoding" in inspect.signature(self.vision.forward).parameters:
            return rows, cols, {"interpolate_pos_encoding": True}
        interpolates = any(hasattr(module, "interpolate_pos_encoding") for module in self.vision.modules())
        return rows, cols, {} if interpolates else None


def resized(pixels: Tensor, size: Grid) -> Tensor:
    """Pixels ``[n, C, H, W]`` at another size, bicubic with antialiasing, in their own dtype."""
    out = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
    return out.to(pixels.dtype)
