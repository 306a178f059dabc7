"""
PyramidDrop: the deeper the layer, the fewer visual tokens, each time ranked by what the last prompt token looks at.

Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR 2025,
arXiv 2410.17247. Code: github.com/Cooperx521/PyramidDrop (MIT, implemented from its description).
Follows the code where the paper's text differs: the attention is that of the layer about to run, on what is about to
enter it, and ``int(V * ratio)`` of the V original tokens stay. Differs from the code in that all images of a prompt
are ranked as one span (the code reduces the first only) and that batches may be padded on the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import Cut, TokenGroup
from lmmhooks.methods.reduction.selection import top_ascending
from lmmhooks.methods.reduction.staging import StagedMethod

__all__ = ["PyramidDrop"]


@dataclass(frozen=True)
class PyramidDrop(StagedMethod):
    """
    Cuts before ``layers`` (a quarter, half and three quarters of the depth) down to ``ratios`` of the original tokens.

    Survivors are renumbered at every cut on models with one-dimensional positions, as released; a user of the release
    measured worse text reading with that, so report ``positions='keep'`` too. ``budget`` keeps the ratio of one cut to
    the next constant (``ratio``, ``ratio**2`` ...): the ratios behind the paper's rows of 192, 128 and 64 tokens were
    not published.
    """

    id: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop, CVPR 2025, arXiv 2410.17247"
    code: ClassVar[str] = "https://github.com/Cooperx521/PyramidDrop"
    published_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    ratios: tuple[float, ...] = setting(
        (0.5, 0.25, 0.125),
        help="Share of the original visual tokens left from each layer on, not rising, in [0, 1]; ignored under a "
        "budget. Paper and code: 0.5, 0.25, 0.125; ablations use powers of 0.4 and 0.6.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(map(float, self.ratios)))
        super().__post_init__()
        self._check_shares("ratios")
        falling = sorted(self.ratios, reverse=True) == list(self.ratios)
        self._require(falling, "ratios", "shares of the original tokens, which do not rise from layer to layer")

    @property
    def is_identity(self) -> bool:
        return super().is_identity if self.budget is not None else min(self.ratios) == 1

    def cuts(self, family: Any) -> list[Cut]:
        stages = zip(self.stage_layers(family), self.ratios, strict=True)
        return [Cut(layer, ratio) for layer, ratio in stages if layer < family.num_layers]

    def probes(self, family: Any) -> list[Probe]:
        return [Probe("decoder_rows", cut.layer, "last", ahead=True) for cut in self.cuts(family)]

    def count(self, share: float, num_tokens: int) -> int:
        return int(num_tokens * share)

    def select(self, tokens: TokenGroup) -> Tensor:
        seen = tokens.probes[Probe("decoder_rows", tokens.layer, "last", ahead=True).name]
        return top_ascending(seen, tokens.num_keep)
