"""What a comparison holds: plain values for JSON, and a page that shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.comparison.measures import carve_entropy, divergence
from lmmhooks.comparison.trace import Trace
from lmmhooks.inspect.maps.result import CARVE_LAYERS, SPANS

if TYPE_CHECKING:
    from os import PathLike

    from PIL import Image

    from lmmhooks.comparison.places import Cells
    from lmmhooks.stats import Stats

__all__ = ["BASELINE", "Comparison", "Difference", "Run", "Token"]

BASELINE = "baseline"


@dataclass(frozen=True)
class Token:
    """A generated token: its text and the probability the (patched) model gave it, before warpers."""

    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Difference:
    """
    A variant X against the baseline B, token by token along the baseline's answer; natural logarithms.

    Attributes
    ----------
    dlogp
        ``[T]`` log-probability of the baseline's token in X minus that in B; -inf where X rules it out.
    kl, kl_reverse
        ``[T]`` KL(B || X) and KL(X || B); infinite where one rules out what the other does not.
    diverges_at
        First step, counted from 0, at which X would choose another token than the baseline did; None if there is none.
    """

    dlogp: Tensor
    kl: Tensor
    kl_reverse: Tensor
    diverges_at: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values; None stands for what is infinite."""
        return {
            "dlogp": plain(self.dlogp),
            "dlogp_sum": plain(self.dlogp.sum()),
            "kl_baseline_variant": plain(self.kl),
            "kl_variant_baseline": plain(self.kl_reverse),
            "diverges_at": self.diverges_at,
        }


@dataclass(frozen=True, eq=False)
class Run:
    """
    One answer.

    Attributes
    ----------
    name
        ``"baseline"`` or the methods, joined by ``" + "``.
    text
        The answer, stripped.
    tokens
        Its tokens with probabilities, special ones left out; empty for methods that put an answer together themselves.
    visual_share
        Per decoder layer, attention mass of the last prompt row on visual tokens (mean over heads, 0 to 1); empty for
        methods that put an answer together themselves.
    image_map
        Mean over layers and heads of that row's attention, on the token grid ``[rows][columns]`` of the first image's
        first crop; cells whose token is not there are None. None without an image or without a known grid.
    kept
        Same grid: whether the token reaches the last decoder layer.
    first_token_ms
        Time from the call of ``generate`` to the first logits, image encoding included; to those of the first pass for
        methods that answer in several.
    total_ms
        Time of the whole call; nothing was read meanwhile.
    stats
        Of the (newest) prompt; see `lmmhooks.stats.Stats`. Of an answer in several generations with the FLOPs of all.
    num_tokens
        Tokens generated, the end token included; None where a method generates several times.
    passes
        Forwards that read more than one token: 1 for a plain answer.
    peak_bytes
        Largest memory in use on the device meanwhile; None where the device does not tell.
    along
        Led along the baseline's answer; None where that is not possible, `note` says why.
    own
        Led along its own answer; the same object where that is the baseline's.
    cells
        Of every image, where the visual tokens of `along` lie; None where that is not known.
    difference
        To the baseline; None for the baseline and without `along`.
    margin
        Log-probability of Yes minus that of No at the first token, for yes/no questions; None for others.
    looked_at
        Pictures that the model answered about, where a method made new ones.
    note
        What is missing and why; empty if nothing is.
    """

    name: str
    text: str
    tokens: tuple[Token, ...]
    visual_share: tuple[float, ...]
    image_map: tuple[tuple[float | None, ...], ...] | None
    kept: tuple[tuple[bool, ...], ...] | None
    first_token_ms: float
    total_ms: float
    stats: Stats
    num_tokens: int | None = None
    passes: int = 1
    peak_bytes: int | None = None
    along: Trace | None = None
    own: Trace | None = None
    cells: tuple[Cells | None, ...] = ()
    difference: Difference | None = None
    margin: float | None = None
    looked_at: tuple[Image.Image, ...] = ()
    note: str = ""

    @property
    def token_ms(self) -> float | None:
        """Milliseconds per token after the first; None without one, and where that is not known."""
        if self.num_tokens is None or self.num_tokens < 2:
            return None
        return (self.total_ms - self.first_token_ms) / (self.num_tokens - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values; attention maps are means over layers."""
        own = None if self.own is self.along else self.own
        return {
            "name": self.name,
            "text": self.text,
            "tokens": [{"text": token.text, "probability": token.probability} for token in self.tokens],
            "visual_share": list(self.visual_share),
            "image_map": None if self.image_map is None else [list(row) for row in self.image_map],
            "kept": None if self.kept is None else [list(row) for row in self.kept],
            "first_token_ms": self.first_token_ms,
            "total_ms": self.total_ms,
            "token_ms": self.token_ms,
            "num_tokens": self.num_tokens,
            "passes": self.passes,
            "peak_bytes": self.peak_bytes,
            "stats": self.stats.to_dict(),
            "along_baseline": None if self.along is None else trace_dict(self.along),
            "along_own": None if own is None else trace_dict(own),
            "difference": None if self.difference is None else self.difference.to_dict(),
            "margin": self.margin,
            "note": self.note,
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """
    The same prompt under several variants; the first run is the baseline.

    Attributes
    ----------
    prompt
        The question.
    image
        The first image, RGB, or None.
    runs
        Baseline first, then the methods in the order given.
    images
        All images.
    model
        Identity of the checkpoint (`lmmhooks.loading.identity`), with ``dtype``, ``device`` and ``backend``.
    """

    prompt: str
    image: Image.Image | None
    runs: tuple[Run, ...]
    images: tuple[Image.Image, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> Run:
        return self.runs[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values; pictures are left out."""
        return {"prompt": self.prompt, "model": self.model, "runs": [run.to_dict() for run in self.runs]}

    def to_html(self, path: str | PathLike[str]) -> Path:
        """
        Write one self-contained page: answers, where the model looks at every token, probabilities, cost.

        Raises
        ------
        LmmhooksError
            The file cannot be written.
        """
        from lmmhooks.comparison.page import write

        return write(self, path)


def plain(values: Tensor, digits: int = 6) -> Any:
    """A tensor as nested lists (or a number) of so many significant digits; None for what is not finite."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(item) for item in value]
        if not math.isfinite(value):
            return None
        return float(f"{value:.{digits}g}") if isinstance(value, float) else value

    return number(values.tolist())


def trace_dict(trace: Trace) -> dict[str, Any]:
    """JSON-compatible values of a trace: per token, and per token and layer."""
    sinks = trace.sinks.nonzero().flatten()
    return {
        "tokens": [
            {
                "id": token,
                "text": text,
                "logp": plain(logp),
                "rank": int(rank),
                "top": [{"text": c.text, "probability": c.probability} for c in candidates],
            }
            for token, text, logp, rank, candidates in zip(
                trace.tokens, trace.texts, trace.logp, trace.rank, trace.candidates, strict=True
            )
        ],
        "spans": list(SPANS),
        "shares": plain(trace.shares),
        "entropy": plain(trace.entropy),
        "entropy_carve": carve_entropy(trace.entropy),
        "entropy_carve_layers": list(CARVE_LAYERS),
        "maps": plain(trace.maps, 4),
        "image_of_token": trace.images.tolist(),
        "removed_before_layer": [
            None if int(layer) == trace.present.shape[0] else int(layer) for layer in trace.removed
        ],
        "sinks": sinks.tolist(),
        "sink_share": trace.sink_share,
    }


def compared(baseline: Trace, variant: Trace) -> Difference:
    """A variant against the baseline, both led along the same answer."""
    # Both infinite (a token that both rule out) is no difference.
    same = baseline.logp == variant.logp
    dlogp = torch.where(same, torch.zeros_like(baseline.logp), variant.logp - baseline.logp)
    p, q = baseline.distribution, variant.distribution
    assert p is not None
    assert q is not None
    return Difference(dlogp, divergence(p, q), divergence(q, p), variant.chosen_otherwise())
