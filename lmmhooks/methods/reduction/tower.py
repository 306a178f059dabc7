"""
Contract of reducers that act inside the vision tower: later vision layers already run on fewer tokens.

Shapes: G crops (tiles, frames), t tokens of a crop that are left, class token included where there is one, C width,
H heads, d head width. Crops are independent of each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import Cut, ReductionMethod, Scope, TokenGroup

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TowerMethod", "TowerStep", "TowerTokens", "are_layers", "gather_tokens", "patch_count", "survivors"]

ROW_BLOCK = 256
"""Query rows whose attention is held at once where all of them are needed."""


@dataclass(frozen=True, eq=False)
class TowerStep:
    """
    What is left of the crops after a layer's reduction.

    Attributes
    ----------
    states
        ``[G, t2, C]``, the class token still first.
    origin
        ``[G, t2]`` long: the slot of the full sequence that a token is shown at; the number of slots for padding.
    weight
        ``[G, t2]`` float32 > 0: how often a token counts as a key, whose logarithm later layers add to the attention
        logits; None for once.
    valid
        ``[G, t2]`` bool: no padding; None where all crops are equally long.
    """

    states: Tensor
    origin: Tensor
    weight: Tensor | None = None
    valid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TowerTokens:
    """
    The tokens of all crops of an encoder call at one vision layer.

    Attributes
    ----------
    layer
        0-based.
    family
        The resolved model family.
    states
        ``[G, t, C]``: residual stream between attention and MLP, or the layer's output (`TowerMethod.after`).
    query, key, value
        ``[G, H, t, d]`` of this layer's attention, biases included.
    scaling
        Factor on its dot products.
    bias
        ``[G, 1, 1, t]`` float32 that was added to its logits: logarithms of weights, the least float32 for padding;
        None for zeros.
    num_slots
        Tokens of a crop before any reduction, class token included.
    origin, valid
        As in `TowerStep`.
    memory
        Private to the method, empty at every encoder call.
    """

    layer: int
    family: Any
    states: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    bias: Tensor | None
    num_slots: int
    origin: Tensor
    valid: Tensor | None
    memory: dict[str, Any]

    @property
    def first(self) -> int:
        """Index of the first patch: 1 behind a class token, else 0."""
        return int(self.family.has_cls)

    @property
    def num_patches(self) -> int:
        """Patches of a crop before any reduction."""
        return self.num_slots - self.first

    def logits(self, rows: slice) -> Tensor:
        """``[G, H, R, t]`` float32 attention logits of some query rows, as this layer used them."""
        scores = (self.query[:, :, rows] @ self.key.transpose(2, 3)).float() * self.scaling
        return scores if self.bias is None else scores + self.bias

    @cached_property
    def saliency(self) -> Tensor:
        """
        ``[G, H, t - first]`` float32: what patches receive from the class token, as it is in its softmax over all
        tokens; without a class token, the mean over what all patches give.
        """
        if self.first:
            return self.logits(slice(0, 1)).softmax(dim=-1)[:, :, 0, 1:]
        length = self.query.shape[2]
        total: Tensor | None = None
        for start in range(0, length, ROW_BLOCK):
            rows = slice(start, min(start + ROW_BLOCK, length))
            weights = self.logits(rows).softmax(dim=-1)
            if self.valid is not None:
                weights = weights * self.valid[:, None, rows, None]
            part = weights.sum(dim=2)
            total = part if total is None else total + part
        assert total is not None
        return total / (length if self.valid is None else self.valid.sum(dim=1)[:, None, None])

    def take(self, index: Tensor, valid: Tensor | None = None) -> TowerStep:
        """The tokens at ``index [G, t2]``, each of weight 1; ``valid``: those that are no padding."""
        origin = self.origin.gather(1, index)
        if valid is not None:
            origin = origin.masked_fill(~valid, self.num_slots)
        return TowerStep(gather_tokens(self.states, index), origin, valid=valid)

    def keep(self, mask: Tensor) -> tuple[TowerStep, Tensor]:
        """
        The tokens of a mask ``[G, t]`` in their order, and their indices ``[G, t2]``; crops may keep different numbers.

        Waits for the device: the longest crop decides how long the sequence becomes.
        """
        counts = mask.sum(dim=1)
        most, least = torch.stack([counts.max(), counts.min()]).tolist()
        index = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
        valid = None if least == most else torch.arange(most, device=mask.device) < counts[:, None]
        return self.take(index, valid), index


@dataclass(frozen=True)
class TowerMethod(ReductionMethod):
    """
    Removes or merges tokens between the layers of the vision tower, crop by crop.

    What is left after the layer whose output the projector takes returns to the slots of the full grid, so that
    projector and packing notice nothing; the other visual tokens leave before the first decoder layer. Survivors enter
    the decoder in raster order. Vision layers behind that layer are wasted in the unpatched model too, and run on the
    full grid.

    Counts hold for what leaves the tower: survivors in the padding that LLaVA-NeXT cuts off never reach the decoder.
    Where packing interpolates a large mosaic (LLaVA-OneVision), a token of the decoder survives that shows survivors
    for at least half; slots of tokens that left hold the state they left with. Videos that are pooled are refused.
    """

    after: ClassVar[Literal["attention", "layer"]] = "attention"
    """Where :meth:`reduce` is asked: between attention and MLP of a layer, or on its output."""
    needs_cls: ClassVar[str] = ""
    """Why no tower without a class token will do; empty where one will."""

    keep: int | float | None = setting(
        None, help="Tokens left of every crop (image, tile): a count (128), or a share in (0, 1] of its patches."
    )
    # Crops are independent inside the tower, which does not know what image they belong to; and as the only cut is
    # before the decoder, a count is a budget already.
    keep_per: Any = field(default="crop", init=False, repr=False)
    budget: int | float | None = field(default=None, init=False, repr=False)
    budget_unit: Any = field(default="average", init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.keep is None or self.keep > 0, "keep", "a token count >= 1 or a share in (0, 1]")

    @property
    def scope(self) -> Scope:
        return "crop"

    def check(self, family: Any) -> None:
        super().check(family)
        if reason := _unsuited(family):
            raise MethodError(f"{self.id}: {reason}; reduce behind the tower instead (tome-post, fastervlm ...)")
        if self.needs_cls and not family.has_cls:
            raise MethodError(f"{self.id}: the vision tower of {family.name} has no class token, {self.needs_cls}")
        if (most := patch_count(family)) is not None and isinstance(self.keep, int) and self.keep > most:
            raise MethodError(
                f"{self.id}: keep={self.keep} is more than the {most} patches of a crop on {family.name}; give at most "
                f"{most}"
            )

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(0, None)]

    def probes(self, family: Any) -> list[Probe]:
        return [Probe("tower_kept", family.feature_layer)]

    def target(self, num_patches: int) -> int:
        """Tokens that ``keep`` leaves of a crop, class token not counted."""
        assert self.keep is not None
        count = self.count(self.keep, num_patches) if isinstance(self.keep, float) else self.keep
        return min(count, num_patches)

    def tower_layers(self, family: Any) -> Sequence[int]:
        """Vision layers at which :meth:`reduce` is asked, 0-based, none behind `Family.feature_layer`."""
        raise NotImplementedError

    def reduce(self, tokens: TowerTokens) -> TowerStep | None:
        """What is left after this layer; None to leave all as it is."""
        raise NotImplementedError

    def select(self, tokens: TokenGroup) -> Tensor:
        (kept,) = tokens.probes.values()
        return survivors(kept)


def gather_tokens(states: Tensor, index: Tensor) -> Tensor:
    """States ``[G, t, C]`` at ``index [G, t2]``: ``[G, t2, C]``."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def survivors(kept: Tensor) -> Tensor:
    """Ascending indices ``[G, V]`` of the tokens of which at least half is left, ``kept [G, V]``; -1 behind them."""
    gone = kept < 0.5
    order = gone.to(torch.uint8).sort(dim=1, stable=True).indices
    return order.masked_fill(gone.gather(1, order), -1)


def are_layers(given: Sequence[int]) -> bool:
    """Whether these are vision layers in ascending order, at least one."""
    return bool(given) and given[0] >= 0 and all(a < b for a, b in pairwise(given))


def patch_count(family: Any) -> int | None:
    """Patches of a crop where the tower has one resolution, else None."""
    size, patch = (getattr(family.vision.config, name, None) for name in ("image_size", "patch_size"))
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else None


def _unsuited(family: Any) -> str | None:
    """Why tokens cannot leave between the layers of a tower, or None."""
    if isinstance(getattr(family.model.config, "vision_feature_layer", None), (list, tuple)):
        return f"the projector of {family.name} reads several vision layers, which would differ in length"
    if family.window_attention:
        return f"the vision tower of {family.name} attends inside windows, which need all patches in their places"
    layer: nn.Module = family.vision_layers[0]
    given = inspect.signature(type(layer).forward).parameters
    named = [name for name, parameter in given.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if extra := sorted(set(named) - {"self", "hidden_states", "attention_mask"}):
        return f"{type(layer).__name__} is given {', '.join(extra)} of all patches"
    parts = {
        family.attention_norm_of(layer), family.attention_of(layer), family.mlp_norm_of(layer), family.mlp_of(layer)
    }  # fmt: skip
    if set(layer.children()) != parts or list(layer.parameters(recurse=False)):
        return f"{type(layer).__name__} is more than attention and MLP behind a norm each"
    return None
