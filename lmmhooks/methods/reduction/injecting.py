"""Contract of methods that show the model its image again while it answers: when, and in how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmmhooks.methods.base import Method, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.vision import ImageTokens

__all__ = ["InjectionMethod", "Pooling"]


@dataclass(frozen=True, eq=False)
class Pooling:
    """
    How the V tokens of an image become M.

    Attributes
    ----------
    weights
        ``[M, V]`` float32; every row sums to 1.
    row, col
        ``[M]`` long: cell of every new token in the pooled grid of its crop.
    """

    weights: Tensor
    row: Tensor
    col: Tensor


@dataclass(frozen=True)
class InjectionMethod(Method):
    """
    Appends a line of text and a copy of the images in fewer tokens to the answer, once or several times.

    They enter the cache behind the newest token, in the forward of that token, and do not appear in what is generated.
    Rows of the batch without an image get none.
    """

    kind: ClassVar[str] = "reduction"

    bridge: str | tuple[int, ...] = setting(
        (), help="Text before the images, for which wrap needs the processor, or its token ids; empty: none."
    )
    max_injections: int = setting(2, help="Most injections per answer, >= 0; 0 changes nothing.")

    def __post_init__(self) -> None:
        if isinstance(self.bridge, Sequence) and not isinstance(self.bridge, str):
            # Recipes write lists.
            object.__setattr__(self, "bridge", tuple(self.bridge))
        ids = isinstance(self.bridge, tuple) and all(isinstance(i, int) and i >= 0 for i in self.bridge)
        self._require(isinstance(self.bridge, str) or ids, "bridge", "a text or a sequence of token ids")
        count = isinstance(self.max_injections, int) and not isinstance(self.max_injections, bool)
        self._require(count and self.max_injections >= 0, "max_injections", "an integer >= 0")

    @property
    def is_identity(self) -> bool:
        return self.max_injections == 0

    @property
    def reads_text(self) -> bool:
        """Whether :meth:`due` looks at what was generated, for which wrap needs the processor."""
        return False

    def due(self, generated: int, since: int | None, text: str) -> bool:
        """
        Whether a row gets an injection behind its newest token.

        Parameters
        ----------
        generated
            Tokens generated so far, the newest included; >= 1.
        since
            Of those, how many since the row's last injection; None before the first.
        text
            End of what the row generated, empty unless :attr:`reads_text`.
        """
        raise NotImplementedError

    def pool(self, tokens: ImageTokens) -> Pooling:
        """How one image is made smaller; ``tokens`` are all of its visual tokens, with their places in its crops."""
        raise NotImplementedError
