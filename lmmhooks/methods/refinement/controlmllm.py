"""
ControlMLLM: make the model look where the caller points, by an offset on the image's embeddings found for a question.

A few gradient steps move attention over the image into a region; the answer is given under the offset. No weights are
trained, yet every question is optimised for: each step is a forward and a backward pass up to the last layer read.

The defaults are ControlMLLM++ (attention of the last position, middle layers, Adam); ``preset='v1'`` is the first
paper, whose code adds every step's offset to the embeddings in place, so that offsets add up (`accumulate`). The region
is ``patch.answer(..., region=(left, top, right, bottom))``; without one, the best region of another method's map
(`map`; ours, UNVERIFIED). The contrast of ++ with embeddings without offset is left out: the released code does not
hold its formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.answering import Ask
from lmmhooks.methods.refinement.base import Look, LookAgain, RefinementMethod, layers_that_exist
from lmmhooks.methods.refinement.nested import bound, look_again
from lmmhooks.methods.refinement.pointing import closeness, distances, region_loss, sampled, steered
from lmmhooks.methods.refinement.regions import best_regions, box_of, top_share

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmmhooks.geometry import Box, Geometry

__all__ = ["ControlMLLM"]

#: Share of the decoder below and through the layers read: 14 to 25 of LLaVA-1.5-7B's 32, 12 to 27 of Qwen2.5-VL's 28.
DEPTHS = {"llava": (14 / 32, 26 / 32), "qwen": (12 / 28, 1.0)}


@dataclass(frozen=True)
class ControlMLLM(RefinementMethod):
    """Answer while attention over the image is drawn into a region."""

    id: ClassVar[str] = "controlmllm"
    paper: ClassVar[str] = "ControlMLLM: Training-Free Visual Prompt Learning, NeurIPS 2024, arXiv:2407.21534"
    code: ClassVar[str] = "https://github.com/mrwu-mac/ControlMLLM"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "v1": {
            "optimizer": "sgd",
            "lr": 1.0,
            "updates": 5,
            "beta": 0.5,
            "accumulate": True,
            "early_stop": 25.0,
            "read_layers": "all",
            "rows": "all",
            "sigma": 0.1,
        },
        "++": {},
        "++captions": {"updates": 3, "lr": 0.03},
    }

    alpha: float = setting(400.0, help="Factor of the loss, above 0.")
    updates: int | None = setting(
        None, help="Gradient steps, 0 or more; the authors' T of ++ counts the answer too. None: 3, on Qwen models 1."
    )
    lr: float | None = setting(None, help="Length of a step, 0 or more. None: 0.03, on Qwen models 0.02.")
    optimizer: str = setting("adam", help="'adam' (epsilon 1e-3) or 'sgd'.")
    beta: float = setting(1.0, help="Share of the newest offset in the moving average applied, in (0, 1]; v1: 0.5.")
    accumulate: bool = setting(False, help="Offsets of all steps add up, as in the code of v1.")
    early_stop: float | None = setting(
        None, help="End when the loss has changed by this percentage, above 0, or has risen. None: never; v1: 25."
    )
    read_layers: tuple[int, ...] | str | None = setting(
        None, help="Layers whose attention is moved, or 'all'. None: 14 to 25 of 32, Qwen models 12 to 27 of 28."
    )
    rows: str = setting("last", help="Positions whose attention is moved: the 'last', or 'all' after the image (v1).")
    cells: str | None = setting(
        None,
        help="Cells of the region: 'sampled', those whose pixel it holds after the released code's resizing (for one "
        "square grid), or 'touched'. None: sampled on models of one crop of fixed size.",
    )
    target: str = setting("box", help="What the region is: the 'box', or the 'point' in its middle.")
    sigma: float = setting(0.4, help="Width of the weight around a point, in shares of the largest distance, above 0.")
    epsilon: float | None = setting(None, help="Added to the sum of attention, 0+. None: 0, on Qwen models 1e-6.")
    map: str | None = setting(
        None, help="Method whose map gives the region where the caller gives none, such as 'vicrop-rel'; UNVERIFIED."
    )
    share: float = setting(0.2, help="Share of pixels of that map among which the best region is, in (0, 1].")

    def __post_init__(self) -> None:
        if not isinstance(self.read_layers, (str, type(None))):
            object.__setattr__(self, "read_layers", tuple(self.read_layers))
        self._require(self.alpha > 0, "alpha", "above 0")
        self._require(self.updates is None or self.updates >= 0, "updates", "0 or more")
        self._require(self.lr is None or self.lr >= 0, "lr", "0 or more")
        self._require(self.optimizer in ("adam", "sgd"), "optimizer", "'adam' or 'sgd'")
        self._require(0 < self.beta <= 1, "beta", "in (0, 1]")
        self._require(self.early_stop is None or self.early_stop > 0, "early_stop", "above 0")
        named = self.read_layers in (None, "all") or (
            isinstance(self.read_layers, tuple) and len(self.read_layers) > 0 and min(self.read_layers) >= 0
        )
        self._require(named, "read_layers", "layers, 0 or more each, or 'all'")
        self._require(self.rows in ("last", "all"), "rows", "'last' or 'all'")
        self._require(self.cells in (None, "sampled", "touched"), "cells", "'sampled' or 'touched'")
        self._require(self.target in ("box", "point"), "target", "'box' or 'point'")
        self._require(self.sigma > 0, "sigma", "above 0")
        self._require(self.epsilon is None or self.epsilon >= 0, "epsilon", "0 or more")
        self._require(0 < self.share <= 1, "share", "in (0, 1]")
        # Read now, so that a wrong name is found where it is written.
        assert self.map is None or self.source

    @cached_property
    def source(self) -> LookAgain:
        """The method that makes the map."""
        return look_again(self.id, "map", self.map or "")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        if "qwen" in family.name:
            return {"updates": 1, "lr": 0.02, "epsilon": 1e-6, "cells": "touched"}
        fixed = family.tokens_per_image is not None
        return {"updates": 3, "lr": 0.03, "epsilon": 0.0, "cells": "sampled" if fixed else "touched"}

    def bind(self, family: Any) -> ControlMLLM:
        layers = self.read_layers
        if layers is None:
            first, end = (
                round(depth * family.num_layers) for depth in DEPTHS["qwen" if "qwen" in family.name else "llava"]
            )
            layers = tuple(range(first, max(end, first + 1)))
        elif isinstance(layers, str):
            layers = tuple(range(family.num_layers))
        map = None if self.map is None else bound(self.source, family).spec()
        return replace(self, read_layers=layers, map=map)

    @property
    def needs_region(self) -> bool:
        return self.map is None

    def check(self, family: Any) -> None:
        if isinstance(self.read_layers, tuple) and max(self.read_layers) >= family.num_layers:
            raise MethodError(
                f"{self.id}: read_layers={self.read_layers!r} names layers beyond the {family.num_layers} of this model"
            )
        if self.map is not None:
            self.source.check(family)

    def layers(self, family: Any) -> tuple[int, ...]:
        return () if self.map is None else self.source.layers(family)

    def gradient_layers(self, family: Any) -> tuple[int, ...]:
        inner = () if self.map is None else self.source.gradient_layers(family)
        return layers_that_exist((*self._layers(), *inner), family)

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """The answer under the offset; of a region by a flat map, the answer of the model alone."""
        look: Look = ask  # type: ignore[assignment] # what the engine gives to methods of this kind
        box = look.region or self._pointed_at(look)
        offset = None if box is None else self.offset(look, self.weights(look, box))
        return look.tell(prompt, offset=offset, **generate_kwargs).text

    def offset(self, look: Look, weights: Tensor) -> Tensor:
        """``[n, D]`` that draws attention to tokens of weight 1."""

        def loss_of(offset: Tensor) -> Tensor:
            attention = look.steer(look.prompt, self._layers(), offset)
            rows = attention[:, :, -1:] if self.rows == "last" else attention
            return region_loss(rows.mean(dim=(0, 1, 2)), weights.to(rows), self.alpha, self.epsilon or 0.0)

        device = next(look.family.model.parameters()).device
        return steered(
            loss_of,
            torch.zeros(len(weights), look.family.hidden_size, device=device),
            **{name: getattr(self, name) for name in ("updates", "lr")},
            optimizer=self.optimizer,
            beta=self.beta,
            accumulate=self.accumulate,
            early_stop=self.early_stop,
        )

    def weights(self, look: Look, box: Box) -> Tensor:
        """
        float32 ``[n]``: what each visual token counts for a box of the image.

        Raises
        ------
        PromptError
            The model sees nothing of the box.
        """
        geometry = look.geometry
        touched = (geometry.cells_in(box) > 0).float()
        if not touched.any():
            raise PromptError(f"the model sees nothing of region={box}, which its processor cuts off; give another one")
        if self.target == "point":
            picture = np.zeros((look.image.height, look.image.width), dtype=bool)
            picture[int((box[1] + box[3]) / 2), int((box[0] + box[2]) / 2)] = True
            return self._on_cells(geometry, distances(picture), lambda values: closeness(values, self.sigma))
        if self.cells == "touched":
            return touched
        picture = np.zeros((look.image.height, look.image.width), dtype=bool)
        left, top, right, bottom = (int(side) for side in box)
        picture[top:bottom, left:right] = True
        found = self._on_cells(geometry, picture, lambda values: values)
        # A region between the pixels that are picked would draw attention nowhere.
        return found if found.any() else touched

    def _on_cells(self, geometry: Geometry, picture: np.ndarray, weigh: Callable[[Tensor], Tensor]) -> Tensor:
        """float32 ``[n]``: weights of what tokens see of a picture; 0 for tokens that show no part of the image."""
        out = torch.zeros(geometry.num_tokens)
        if self.cells == "sampled":
            [grid, *others] = geometry.grids
            rows, columns = grid.index.shape
            if others or rows != columns:
                raise PromptError(
                    f"{self.id}: cells='sampled' needs one square grid of visual tokens, which this model does not "
                    "make of the image; use cells='touched'"
                )
            there = grid.index >= 0
            out[grid.index[there]] = weigh(sampled(picture, rows))[there]
            return out
        cells = geometry.rectangles()
        seen = ~cells.isnan().any(dim=1)
        across = ((cells[seen, 0] + cells[seen, 2]) / 2).long().clamp(0, picture.shape[1] - 1)
        down = ((cells[seen, 1] + cells[seen, 3]) / 2).long().clamp(0, picture.shape[0] - 1)
        values = torch.from_numpy(picture[down.numpy(), across.numpy()].astype(np.float32))
        out[seen] = weigh(values / 255 if picture.dtype == np.uint8 else values)
        return out

    def _pointed_at(self, look: Look) -> Box | None:
        """The best region of the map; None where it is flat."""
        if self.map is None:
            raise PromptError(
                f"{self.id} needs a region: patch.answer(image, prompt, region=(left, top, right, bottom)) in pixels, "
                "or a method that finds one, such as map='vicrop-rel'"
            )
        saliency = self.source.saliency(look)
        if saliency.spread <= 0:
            return None
        plane = saliency.plane()
        return box_of(best_regions(top_share(plane, self.share), plane, 1))

    def _layers(self) -> tuple[int, ...]:
        assert isinstance(self.read_layers, tuple), "bound"
        return self.read_layers
