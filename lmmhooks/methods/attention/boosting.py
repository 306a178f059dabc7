"""Contract of methods that raise attention logits of image keys in the row that predicts the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.base import Method, setting

# The one method that methods of another kind are made of: PAI, and what was built on it, are boost and guidance.
from lmmhooks.methods.decoding.pai_guidance import PaiGuidance

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BoostMethod", "GuidedBoost", "boost"]

_TWICE = "both raise the logits of the same image keys"


def boost(scores: Tensor, strength: Tensor) -> Tensor:
    """
    Raise logits by a share of their magnitude: ``l + strength * |l|``.

    Parameters
    ----------
    scores
        ``[B, H, R, N]`` float32; changed in place.
    strength
        ``[B, N]``, 0 or more; exactly 0 leaves a key bit for bit as it was.
    """
    return scores.addcmul_(scores.abs(), strength.to(scores)[:, None, None, :])


@dataclass(frozen=True)
class BoostMethod(AttentionMethod):
    """Edits the last row of the prompt and every generated row, in a range of layers."""

    rows: ClassVar[str] = "last"
    conflicts: ClassVar[Mapping[str, str]] = dict.fromkeys(("pai", "fix-imbalance", "heads-guided", "vaf"), _TWICE)
    published: ClassVar[tuple[int, int | None]] = (2, None)
    """First and last layer of the 32 of LLaVA-1.5-7B; None for the last there is."""

    start: int | None = setting(
        None,
        help="First edited layer, 0-based. None: 2 of 32 layers as published, scaled with depth for other decoders.",
    )
    end: int | None = setting(
        None, help="One past the last edited layer. None: all from the first one on, as released (32 of 32)."
    )

    def check(self, family: Any) -> None:
        start, end = self._range(family)
        depth = family.num_layers
        self._require(0 <= start < depth, "start", f"a layer of this model, which has {depth}")
        self._require(start < end <= depth, "end", f"in {start + 1} ... {depth} for a start of {start} on this model")

    def bind(self, family: Any) -> Method:
        start, end = self._range(family)
        return replace(self, start=start, end=end)

    def layers(self, family: Any) -> Sequence[int]:
        return range(*self._range(family))

    def _range(self, family: Any) -> tuple[int, int]:
        first, last = self.published
        depth = family.num_layers
        scaled = depth if last is None else min(depth, round(depth * last / 32) + 1)
        return (
            round(depth * first / 32) if self.start is None else self.start,
            scaled if self.end is None else self.end,
        )


@dataclass(frozen=True)
class GuidedBoost(BoostMethod):
    """A boost that names a strength per key, with PAI's guidance by the prompt without image beside it."""

    gamma: float = setting(
        1.1, help="Guidance by the prompt without image, 0 or more (PAI's paper: 1.1); 1: none, one reading per step."
    )
    plausibility: float = setting(
        0.1,
        help="Plausibility cut of the guidance in [0, 1] (beta of decoding methods): tokens below this times the "
        "largest probability are dropped; 0: no cut.",
    )
    lazy: bool = setting(
        False, help="Run the reading without image only on steps where the cut leaves more than one token; same output."
    )
    compat: Literal["paper", "release"] = setting(
        "paper",
        help="'release': with guidance the first token is predicted without boost, and at gamma=1 every token, as the "
        "released code does by a flag it clears after the first guided step; needs the cache of generate.",
    )

    def __post_init__(self) -> None:
        self._require(self.gamma >= 0, "gamma", "0 or more")
        self._require(0 <= self.plausibility <= 1, "plausibility", "in [0, 1]")
        decided = "False without a plausibility cut (plausibility=0), for no step is decided by the cut then"
        self._require(not self.lazy or self.plausibility > 0, "lazy", decided)
        self._require(self.compat in ("paper", "release"), "compat", "'paper' or 'release'")

    @property
    def boosts(self) -> bool:
        """Whether the strengths can differ from 0."""
        raise NotImplementedError

    def strengths(self, context: AttentionContext) -> Tensor:
        """Strength of every key of the call, ``[B, N]``; 0 for all that is not visual."""
        raise NotImplementedError

    @property
    def is_identity(self) -> bool:
        return not self.parts()

    def parts(self) -> tuple[Method, ...]:
        guidance = PaiGuidance(gamma=self.gamma, beta=self.plausibility, lazy=self.lazy)
        muted = self.compat == "release" and guidance.is_identity
        boost_part = (self,) if self.boosts and not muted else ()
        return boost_part if guidance.is_identity else (*boost_part, guidance)

    def edit_scores(self, scores: Tensor, context: AttentionContext) -> Tensor:
        if self.compat == "release" and context.is_prefill:
            return scores
        return boost(scores, self.strengths(context))
