"""What a diagnosis of attention sinks found: plain values that go into JSON, and a page that shows them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks.errors import LmmhooksError

if TYPE_CHECKING:
    from os import PathLike

    from PIL import Image

    from lmmhooks.comparison import Comparison

__all__ = [
    "Activation",
    "Channels",
    "ImageNorms",
    "LayerSinks",
    "Magnet",
    "Outlier",
    "Picture",
    "SampleSinks",
    "SinkReport",
    "SinkToken",
]

SEGMENTS = ("system", "image", "question")
"""Segments of a prompt; text between two images counts as question, and so does all text without an image."""


@dataclass(frozen=True)
class SinkToken:
    """
    A position that some detector noticed in a layer.

    Attributes
    ----------
    position
        In the prompt, padding not counted.
    segment
        One of `SEGMENTS`.
    label
        ``"sink"``, ``"unconfirmed"`` (the hidden state says so, nothing agrees) or ``"attention only"``.
    detectors
        Those that spoke, such as ``("D1", "D5")``.
    text
        The token; None for visual tokens and without a tokenizer.
    image, crop, row, column
        Which cell of which crop a visual token shows; None for text, -1 for newline and separator tokens.
    score
        D1 where sink channels are known, D2 elsewhere.
    channel, peak
        Channel and size of its largest magnitude.
    cosine
        Similarity to the first token.
    received
        Attention, mean over heads and over the probe rows that see it; None where too few do.
    value_ratio, contribution_ratio
        Norm of its value vector, and of what it adds to the rows, relative to the layer's median.
    """

    position: int
    segment: str
    label: str
    detectors: tuple[str, ...]
    text: str | None
    image: int | None
    crop: int | None
    row: int | None
    column: int | None
    score: float
    channel: int
    peak: float
    cosine: float
    received: float | None
    value_ratio: float | None
    contribution_ratio: float | None


@dataclass(frozen=True)
class Activation:
    """One of the largest activations of a layer input, with its sign."""

    value: float
    position: int
    channel: int


@dataclass(frozen=True)
class LayerSinks:
    """
    One decoder layer of one sample; states are those the layer is given.

    Attributes
    ----------
    layer
        0-based.
    judged
        False for the first layers, where sinks do not exist yet or vision features are still added: no labels there.
    tokens
        What the detectors noticed, by position.
    counts
        Sinks per segment; empty where the layer is not judged.
    mass
        Attention of the probe rows per segment, mean over heads and rows; sums to 1.
    sink_mass
        The part of it on sinks, ``"text"`` and ``"visual"``; empty where there are none.
    visual_sink_share
        Share of the attention on the image that goes to visual sinks; None where there are none.
    image_centric_heads
        Heads that look at the image, mean over probe rows; None without image.
    cosine
        Mean squared cosine to the first token per segment, that token left out.
    cosine_histogram
        Positions per tenth of the range from -1 to 1.
    top, median
        Largest activations and the median magnitude.
    """

    layer: int
    judged: bool
    tokens: tuple[SinkToken, ...]
    counts: dict[str, int]
    mass: dict[str, float]
    sink_mass: dict[str, float]
    visual_sink_share: float | None
    image_centric_heads: float | None
    cosine: dict[str, float]
    cosine_histogram: tuple[int, ...]
    top: tuple[Activation, ...]
    median: float

    @property
    def sinks(self) -> tuple[SinkToken, ...]:
        """The tokens labelled as sinks."""
        return tuple(token for token in self.tokens if token.label == "sink")


@dataclass(frozen=True)
class Outlier:
    """A visual token whose vision features have a norm far above the rest (D8); ``layers``: where it is a sink too."""

    position: int
    crop: int
    row: int
    column: int
    norm: float
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ImageNorms:
    """Feature norms of one image at the vision layer the projector reads."""

    image: int
    tokens: int
    median: float
    threshold: float
    largest: float
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True)
class Magnet:
    """
    A text token that nearly all probe rows favour in deep layers, and that is no sink there.

    Attributes
    ----------
    position, text
        See `SinkToken`.
    layers
        Layers of the deep half in which it is one.
    received
        Mean attention it receives there.
    """

    position: int
    text: str | None
    layers: tuple[int, ...]
    received: float


@dataclass(frozen=True)
class SampleSinks:
    """
    One row of the batch.

    Attributes
    ----------
    sample
        Its number.
    length
        Tokens, padding not counted.
    segments
        Tokens per segment.
    probe_rows
        Rows whose attention was read.
    findings
        What was found, and what was looked for and not found, in words.
    layers
        One entry per decoder layer.
    images
        One entry per image; None if they were encoded outside the model.
    magnets
        Stop-word magnets.
    head_received
        Per position, share of all (layer, head) pairs that pay it more than `Criteria.head_received`; zeros left out.
    """

    sample: int
    length: int
    segments: dict[str, int]
    probe_rows: int
    findings: tuple[str, ...]
    layers: tuple[LayerSinks, ...]
    images: tuple[ImageNorms, ...] | None
    magnets: tuple[Magnet, ...]
    head_received: dict[int, float]


@dataclass(frozen=True)
class Channels:
    """
    Channels that carry massive activations.

    Attributes
    ----------
    dims
        Those D1 reads; empty where none were found.
    visual_dims
        Channels that stand out only in prompts with an image.
    source
        ``"measured"`` on this checkpoint, or ``"given"``.
    published
        Those published for this architecture, for comparison; None where there are none.
    evidence
        Of the measurement; see `lmmhooks.engines.sinks.SinkDims`.
    """

    dims: tuple[int, ...]
    visual_dims: tuple[int, ...]
    source: str
    published: tuple[int, ...] | None
    evidence: dict[str, Any]

    @property
    def sentence(self) -> str:
        """The same in words."""
        visual = f"; channels that come with an image: {_listed(self.visual_dims)}" if self.visual_dims else ""
        if not self.dims:
            reason = f" ({self.evidence['summary']})" if "summary" in self.evidence else ""
            used = "judged by massive activations and alignment with the first token"
            return f"no sink channels{reason}; {used}{visual}"
        differ = self.published is not None and set(self.published) != set(self.dims)
        warning = f", not the published {_listed(self.published or ())}" if differ else ""
        return f"sink channels {_listed(self.dims)}, {self.source}{warning}{visual}"


@dataclass(frozen=True)
class Picture:
    """A crop as the model saw it, with the number of rows and columns of its token grid."""

    sample: int
    image: int
    crop: int
    grid: tuple[int, int]
    pixels: Image.Image


@dataclass(frozen=True)
class SinkReport:
    """
    Attention sinks of a batch of prompts; made by `lmmhooks.inspect.sinks`.

    Attributes
    ----------
    model
        Identity of the checkpoint; see `lmmhooks.loading.identity`.
    channels
        Channels of massive activations.
    settings
        Criteria with the threshold filled in, probe rows, ``rho`` and ``min_visual``.
    samples
        One entry per row of the batch.
    pictures
        What the page draws on; not part of the JSON.
    """

    model: dict[str, Any]
    channels: Channels
    settings: dict[str, Any]
    samples: tuple[SampleSinks, ...]
    pictures: tuple[Picture, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values, arrays indexed by layer; pictures are left out."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "pictures"}

    def to_json(self, path: str | PathLike[str]) -> Path:
        """
        Write `to_dict` as JSON.

        Raises
        ------
        LmmhooksError
            The file cannot be written.
        """
        target = Path(path)
        try:
            target.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise LmmhooksError(f"cannot write {str(target)!r}: {error.strerror}; choose another place") from None
        return target

    def to_html(self, path: str | PathLike[str], answer: Comparison | None = None) -> Path:
        """
        Write one self-contained page: findings, sinks on the images, curves and a table per layer.

        Parameters
        ----------
        path
            Of the file.
        answer
            The same prompt answered (`lmmhooks.compare` without methods): the page shows first where the model looks at
            every token of its answer.

        Raises
        ------
        LmmhooksError
            The file cannot be written.
        """
        from lmmhooks.inspect.page import write

        return write(self, path, answer)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _listed(channels: tuple[int, ...]) -> str:
    return ", ".join(map(str, channels))
