"""
Contract of reduction methods: which visual tokens stay, where in the model the others leave, and what is merged.

Shapes: B rows of the batch, N positions of the sequence, G groups reduced in one call, V visual tokens of a group, K
kept ones, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method, setting
from lmmhooks.methods.probe import Probe

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.layout import Layout
    from lmmhooks.vision import Tiling

__all__ = ["BudgetUnit", "CropwiseMethod", "Cut", "Newline", "Positions", "ReductionMethod", "Scope", "TokenGroup"]

Positions = Literal["auto", "keep", "repack"]
Newline = Literal["drop", "keep_per_row", "per_kept_row", "rank"]
Scope = Literal["crop", "image", "sample"]
BudgetUnit = Literal["average", "kept", "flops", "kv"]

_NEWLINE_HELP = (
    "Newline and other tokens that show no place in the image, once the image loses tokens: 'drop' them as most "
    "released code does, 'keep_per_row' keep all, 'per_kept_row' keep those behind a row of which something is left, "
    "'rank' let them compete like any visual token."
)


@dataclass(frozen=True)
class Cut:
    """
    A place where visual tokens leave.

    Attributes
    ----------
    layer
        Decoder layer, 0-based; the cut happens on its input. 0: after the projector, before any decoder layer.
    keep
        What stays: an int counts tokens per image; a float in (0, 1] is a share of the tokens every group had at the
        method's first cut; None leaves the number to :meth:`ReductionMethod.select`. A budget takes its place.
    hide
        Nothing leaves the sequence; the keys of dropped tokens are hidden from this layer on instead. For ablations: it
        saves neither time nor memory, and gives every surviving token the same states.
    of_current
        A share is of the tokens a group has at this cut instead.
    scope
        What this cut reduces on its own, where that is not `ReductionMethod.scope`.
    """

    layer: int
    keep: int | float | None
    hide: bool = False
    of_current: bool = False
    scope: Scope | None = None


@dataclass(frozen=True, eq=False)
class TokenGroup:
    """
    Groups of visual tokens that one call reduces: crops, images or all of a prompt, with equally many tokens each.

    Groups that lose nothing never reach a method, nor do groups that lose everything.

    Attributes
    ----------
    hidden
        ``[B, N, D]`` the whole sequence at the cut; for methods that look at text too.
    sample
        ``[G]`` long: the row of the batch a group belongs to.
    position
        ``[G, V]`` long: where its tokens stand in ``hidden``, ascending.
    num_keep
        K, between 1 and V - 1; V where the cut leaves the number to the method.
    layer
        Decoder layer before which the cut happens.
    probes
        Values of the method's probes by `Probe.name`, ``[G, V]`` each, ``[G, V, C]`` for those that are no scalars.
    readings
        The same over the whole sequence, ``[B, N]`` or ``[B, N, C]``; for methods that look at text too.
    crop, row, col
        ``[V]`` long, CPU: crop of its image and cell in the crop's grid of every token; -1 where unknown. Shared by the
        groups, but for ``crop`` where every group is one crop: then it is that of the first.
    grid
        Rows and columns of the crop's full token grid; None when unknown or when a group spans several crops.
    family
        The resolved model family; `Family.project` turns features of the tower into states.
    layout
        Of the whole sequence at the cut: masks ``[B, N]``.
    input_ids
        ``[B, N]`` of it; 0 for padding.
    tokenizer
        Of the processor that was given to ``wrap``; None without one.
    tiling
        Groups of one image each: which crop is the whole image and which its tiles; None where there are none.
    seeds
        For methods with `ReductionMethod.draws`: an integer per group, a hash of the prompt's token ids and of the
        group's ordinal; the same on every device and in every batch that the prompt appears in. Empty otherwise.
    scratch
        What :meth:`ReductionMethod.select` leaves for :meth:`ReductionMethod.merge`.
    """

    hidden: Tensor
    sample: Tensor
    position: Tensor
    num_keep: int
    layer: int
    probes: dict[str, Tensor]
    readings: dict[str, Tensor]
    crop: Tensor
    row: Tensor
    col: Tensor
    grid: tuple[int, int] | None
    family: Any
    layout: Layout
    input_ids: Tensor
    tokenizer: Any = None
    tiling: Tiling | None = None
    seeds: tuple[int, ...] = ()
    scratch: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def states(self) -> Tensor:
        """``[G, V, D]`` states of the tokens at the cut, gathered on first use."""
        return self.hidden[self.sample[:, None], self.position]


@dataclass(frozen=True)
class ReductionMethod(Method):
    """
    Removes visual tokens from the prompt.

    A method says where (:meth:`cuts`), by what (:meth:`probes`) and which (:meth:`select`, :meth:`merge`). Everything
    else is the engine's business: groups, gathering states, positions, masks, caches of different length per layer,
    decode steps, restoring the full length.
    """

    kind: ClassVar[str] = "reduction"
    draws: ClassVar[bool] = False
    """The selection is random: fill `TokenGroup.seeds`."""
    cut_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that name decoder layers to cut before; beyond the number of layers they are refused."""
    counts_itself: ClassVar[bool] = False
    """The method meets a budget without help: `cuts` leaves the number to `select`."""

    keep: int | float | None = setting(
        None,
        help="Visual tokens kept: a count per image (128), or a share in (0, 1] of the tokens of every crop, image or "
        "prompt, whichever the method reduces on its own. Required, unless there is a budget.",
    )
    keep_per: Literal["image", "crop", "prompt"] = setting(
        "image",
        help="What an integer keep or budget counts: tokens per 'image' (or video), per 'crop' (or frame), or in the "
        "whole 'prompt', shared out in proportion to what every image has.",
    )
    budget: int | float | None = setting(
        None,
        help="Instead of keep: what the prompt may cost in budget_unit, met exactly whatever the method's cuts. A "
        "count of tokens (192), or a share in (0, 1] of what the prompt costs unreduced.",
    )
    budget_unit: BudgetUnit = setting(
        "average",
        help="'average': visual tokens entering a decoder layer, mean over layers, the figure that compares methods; "
        "'kept': visual tokens after the last cut; 'flops': decoder FLOPs of the prompt; 'kv': bytes of keys and "
        "values. The last two are shares.",
    )
    positions: Positions = setting(
        "auto",
        help="'keep' leaves survivors their original positions, 'repack' renumbers them without gaps; 'auto' repacks "
        "on models with one-dimensional positions, as released code for LLaVA does, and keeps M-RoPE positions.",
    )
    newline: Newline = setting("drop", help=_NEWLINE_HELP)

    def __post_init__(self) -> None:
        if self.keep is not None:
            share = isinstance(self.keep, float) and 0 < self.keep <= 1
            count = isinstance(self.keep, int) and not isinstance(self.keep, bool) and self.keep >= 0
            self._require(share or count, "keep", "a token count >= 0 or a share in (0, 1]")
        self._require(self.keep_per in ("image", "crop", "prompt"), "keep_per", "'image', 'crop' or 'prompt'")
        self._require(
            self.keep_per != "crop" or self.scope == "crop",
            "keep_per",
            f"'image' or 'prompt': {self.id} does not reduce crops on their own",
        )
        units = ("average", "kept", "flops", "kv")
        self._require(self.budget_unit in units, "budget_unit", "one of " + ", ".join(map(repr, units)))
        if self.budget is not None:
            share = isinstance(self.budget, float) and 0 < self.budget <= 1
            tokens = isinstance(self.budget, int) and not isinstance(self.budget, bool) and self.budget > 0
            counted = self.budget_unit in ("average", "kept")
            self._require(
                share or (tokens and counted),
                "budget",
                "a share in (0, 1]"
                + (" or a token count > 0" if counted else f" for budget_unit={self.budget_unit!r}"),
            )
        self._require(self.positions in ("auto", "keep", "repack"), "positions", "'auto', 'keep' or 'repack'")
        allowed = ("drop", "keep_per_row", "per_kept_row") + (("rank",) if self.scope != "crop" else ())
        self._require(self.newline in allowed, "newline", "one of " + ", ".join(map(repr, allowed)))

    @property
    def scope(self) -> Scope:
        """What is reduced on its own: every crop, every image, or all visual tokens of a prompt together."""
        return "image"

    @property
    def is_identity(self) -> bool:
        given = self.keep if self.budget is None else self.budget
        return isinstance(given, float) and given == 1.0

    def check(self, family: Any) -> None:
        if self.positions == "repack" and family.mrope:
            raise MethodError(
                f"{self.id}: positions='repack' has no meaning on {family.name}, whose positions are grid coordinates; "
                "use positions='keep' or 'auto'"
            )
        if self.newline == "rank" and any(probe.signal.startswith("vision") for probe in self.probes(family)):
            raise MethodError(
                f"{self.id}: newline='rank' needs a score for newline tokens, which the vision tower never saw; "
                "use 'drop', 'keep_per_row' or 'per_kept_row'"
            )
        for name in self.cut_settings:
            self._check_layers(family, name)
        self._check_amount(family)
        for cut in self.cuts(family):
            if cut.hide and self.repacks(family):
                raise MethodError(
                    f"{self.id}: positions='repack' cannot renumber tokens that stay in the sequence and are only "
                    "hidden; use positions='keep'"
                )

    def _check_layers(self, family: Any, name: str) -> None:
        """Refuse cuts beyond the decoder; one before the layer after its last is allowed, and does nothing."""
        given = getattr(self, name)
        layers = given if isinstance(given, tuple) else (given,)
        if any(isinstance(layer, int) and layer > family.num_layers for layer in layers):
            raise MethodError(
                f"{self.id}: {name}={given} is beyond the decoder of {family.name}, which has layers 0 to "
                f"{family.num_layers - 1}; give at most {family.num_layers}, which cuts nothing"
            )

    def _check_amount(self, family: Any) -> None:
        """Refuse counts no image of this model has, and budgets that the layers before the first cut exceed."""
        most, name = family.tokens_per_image, "keep" if self.budget is None else "budget"
        given = getattr(self, name)
        if isinstance(given, int) and most is not None and given > most and self.keep_per != "prompt":
            raise MethodError(
                f"{self.id}: {name}={given} is more than the {most} visual tokens an image has on {family.name}; give "
                f"at most {most}"
            )
        first = min((cut.layer for cut in self.cuts(family)), default=0)
        least = first / family.num_layers
        if isinstance(self.budget, float) and self.budget_unit == "average" and self.budget < least:
            raise MethodError(
                f"{self.id}: budget={self.budget} cannot be met by cuts from layer {first} on: the {first} layers "
                f"before them come to {least:.4g} of all {family.num_layers}; give at least that, or cut earlier"
            )

    def repacks(self, family: Any) -> bool:
        """Whether survivors are renumbered on this model."""
        return self.positions == "repack" or (self.positions == "auto" and not family.mrope)

    def cuts(self, family: Any) -> list[Cut]:
        """Where and how far the prompt shrinks; past the last layer is nowhere. Default: once, before the decoder."""
        self._require(
            self.keep is not None or self.budget is not None,
            "keep",
            "a token count or a share in (0, 1]; give one, or a budget",
        )
        return [Cut(0, self.keep)]

    def shares(self, ratio: float, family: Any) -> dict[int, float]:
        """
        How a budget shapes the cuts.

        Parameters
        ----------
        ratio
            In [0, 1]: what the budget is solved for.
        family
            The model family.

        Returns
        -------
        dict
            Share of the prompt's visual tokens left from each cut on, by its layer; must not fall where ``ratio``
            rises. Default: ``ratio`` to the power of the cut's ordinal, counted from 1.
        """
        return {cut.layer: ratio ** (ordinal + 1) for ordinal, cut in enumerate(self.cuts(family))}

    def probes(self, family: Any) -> list[Probe]:
        """Signals the selection needs."""
        return []

    def count(self, share: float, num_tokens: int) -> int:
        """Tokens that a share of ``num_tokens`` means: rounded down, at least 1. Override to round otherwise."""
        # 0.29 * 100 is 28.999... in binary; the user means 29.
        return max(1, math.floor(share * num_tokens + 1e-9))

    def split(self, keep: int, sizes: Sequence[int]) -> list[int]:
        """
        Tokens kept of every crop of an image, when the method reduces crops and an image is to keep ``keep``.

        Default: even, the remainder going to the first crops; what a crop cannot use goes to the others, so that
        exactly ``min(keep, sum(sizes))`` tokens stay.
        """
        quotas = [0] * len(sizes)
        left = min(keep, sum(sizes))
        while left:
            hungry = [i for i, size in enumerate(sizes) if quotas[i] < size]
            share, extra = divmod(left, len(hungry))
            for rank, i in enumerate(hungry):
                given = min(share + (rank < extra), sizes[i] - quotas[i])
                quotas[i] += given
                left -= given
        return quotas

    def select(self, tokens: TokenGroup) -> Tensor:
        """
        Choose the tokens that stay.

        Returns
        -------
        Tensor
            ``[G, K]`` long, local indices in ``[0, V)``, unique within a group, in the order in which the decoder shall
            see them (ascending is raster order). A group that keeps fewer ends in fillers of -1. Where a token is to
            stand for several dropped ones, it takes the slot of one of them, and :meth:`merge` gives it its state.
        """
        raise NotImplementedError

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor | None:
        """
        New states of the kept tokens.

        Parameters
        ----------
        tokens
            As given to :meth:`select`.
        index
            Its answer, ``[G, K]``; -1 for fillers, whose states are ignored.

        Returns
        -------
        Tensor or None
            ``[G, K, D]``, or None when the tokens keep their own states. Positions and deepstack features stay those of
            the slot.
        """
        return None


@dataclass(frozen=True)
class CropwiseMethod(ReductionMethod):
    """
    A reducer that treats every crop (tile, frame) on its own, as methods that score inside the vision tower do.

    Papers on any-resolution models count tokens per crop ("2880 -> 320" is 64 in each of 5 crops); ``keep`` counts per
    image, split evenly over the crops, unless ``keep_per='crop'``.
    """

    @property
    def scope(self) -> Scope:
        return "crop"
