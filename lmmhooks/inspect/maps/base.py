"""Contract of kinds of map: what they are asked for, what they may read, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import MethodError, PromptError

if TYPE_CHECKING:
    from lmmhooks.family import Family
    from lmmhooks.geometry import Geometry
    from lmmhooks.inspect.maps.reading import Answered, Passes

__all__ = ["MapKind", "Question"]


@dataclass(frozen=True, eq=False)
class Question:
    """
    What a map is asked about.

    Attributes
    ----------
    passes
        Of the wrapped model; reads the prompt again where needed.
    answered
        The answer, with the rows that chose its tokens.
    image
        Ordinal of the image.
    geometry
        Of the image.
    rows
        Places in the answer of the tokens that are mapped, ascending.
    layers, heads
        That the map is made of, 0-based.
    within
        Values are wanted within the image: kinds that average over layers and heads restrict each row first.
    """

    passes: Passes
    answered: Answered
    image: int
    geometry: Geometry
    rows: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    within: bool

    @property
    def family(self) -> Family:
        return self.passes.runtime.family

    @property
    def prompt_length(self) -> int:
        """Positions P of the prompt; token t of the answer stands at P + t and is chosen at P + t - 1."""
        return self.answered.layout.length

    @cached_property
    def positions(self) -> Tensor:
        """Long ``[n]``: where the visual tokens of the image stand in the sequence."""
        return self.answered.span.positions

    def mean_rows(self, answered: Answered | None = None, rows: Sequence[int] | None = None) -> Tensor:
        """``[rows, n]`` attention, mean over the layers and heads; NaN for tokens that none of the layers holds."""
        answered = self.answered if answered is None else answered
        missing = [t for t in (self.rows if rows is None else rows) if not answered.rows[t]]
        if missing:
            raise PromptError(
                f"attention of token {missing[0]} of the answer could not be read: caches were compressed and hold "
                "other positions for every head; map the first token alone, with tokens=[0]"
            )
        read = answered.stacked("within" if self.within else "share", self.family.num_layers)
        shares = read[list(self.rows if rows is None else rows)][:, list(self.layers)]
        # A token gets no attention in layers that it does not reach.
        known = ~shares.isnan().all(dim=2, keepdim=True)
        mean = shares.nan_to_num(0.0).sum(dim=1) / known.sum(dim=1)
        return mean.masked_fill(shares.isnan().all(dim=1), torch.nan)

    def without_gone(self, values: Tensor) -> Tensor:
        """Values ``[rows, n]`` with NaN for tokens that none of the layers holds."""
        read = self.answered.stacked("share", self.family.num_layers)[0][list(self.layers)]
        return values.masked_fill(read.isnan().all(dim=0), torch.nan)


@dataclass(frozen=True)
class MapKind:
    """A kind of map; its fields are its settings."""

    id: ClassVar[str]
    uses_layers: ClassVar[bool] = True
    """Whether layers and heads can be chosen."""
    reads_states: ClassVar[bool] = False
    """Whether it wants `Answered.states`."""
    paper: ClassVar[str] = ""

    def default_layers(self, family: Family) -> Sequence[int]:
        """Decoder layers it is made of where none are chosen."""
        return range(family.num_layers)

    def values(self, question: Question) -> Tensor:
        """``[rows, n]`` float32; NaN for visual tokens without a value."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """All settings as JSON-compatible values."""
        return asdict(self)

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise MethodError(f"kind {self.id!r}: {name}={getattr(self, name)!r} is not allowed; it must be {allowed}")
