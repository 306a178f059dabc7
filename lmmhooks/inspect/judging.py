"""From what was read of a prompt to labels: which positions the detectors agree on, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmmhooks.family import Family
from lmmhooks.inspect import detectors
from lmmhooks.inspect.detectors import Criteria
from lmmhooks.inspect.findings import describe
from lmmhooks.inspect.reading import LayerReading, Reading, SampleReading
from lmmhooks.inspect.report import (
    SEGMENTS,
    Activation,
    ImageNorms,
    LayerSinks,
    Magnet,
    Outlier,
    SampleSinks,
    SinkToken,
)
from lmmhooks.layout import Segment

__all__ = ["Judge"]


@dataclass(frozen=True)
class _Cell:
    """What a visual token shows."""

    image: int
    crop: int
    row: int
    column: int


class Judge:
    """
    Turns the reading of one sample into its part of the report.

    Parameters
    ----------
    family
        Of the model.
    reading
        Of the batch.
    criteria
        Thresholds; ``tau`` filled in.
    index
        Row of the batch.
    channels_known
        Whether scores were read over known sink channels.
    texts
        Text of every valid token, None where it is not known.
    """

    def __init__(
        self,
        family: Family,
        reading: Reading,
        criteria: Criteria,
        index: int,
        channels_known: bool,
        texts: list[str | None],
    ) -> None:
        self.family, self.criteria, self.index = family, criteria, index
        self.channels_known, self.texts = channels_known, texts
        self.sample: SampleReading = reading.samples[index]
        self.length = len(self.sample.columns)
        self.spans = reading.layout.spans_of(index)
        kinds = reading.layout.segment[index].cpu()[self.sample.columns]
        values = dict(zip(SEGMENTS, (Segment.SYSTEM, Segment.VISUAL, Segment.INSTRUCTION), strict=True))
        self.masks = {name: kinds == value for name, value in values.items()}
        self.cells = self._cells()
        # Massive activations appear after the first layers; deepstack layers still receive vision features.
        self.first = max(2, family.deepstack_layers)

    def judge(self) -> SampleSinks:
        layers = tuple(self._layer(number) for number in range(self.family.num_layers))
        magnets = self._magnets(layers)
        images = self._images(layers)
        sample = SampleSinks(
            sample=self.index,
            length=self.length,
            segments={name: int(mask.sum()) for name, mask in self.masks.items()},
            probe_rows=self.sample.num_rows,
            findings=(),
            layers=layers,
            images=images,
            magnets=magnets,
            head_received=self._head_received(),
        )
        return replace(sample, findings=describe(sample, self._judged_by_attention()))

    # -- one layer ----------------------------------------------------------------------------------------------------

    def _layer(self, number: int) -> LayerSinks:
        reading = self.sample.layers[number]
        received = self._received(reading)
        judged = number >= self.first
        tokens = self._tokens(number, reading, received) if judged else ()
        sinks = torch.zeros(self.length, dtype=torch.bool)
        sinks[[token.position for token in tokens if token.label == "sink"]] = True
        mass = reading.weights.mean(dim=0) / self.sample.num_rows
        visual = self.masks["image"]
        on_sinks = {"text": sinks & ~visual, "visual": sinks & visual}
        on_image, on_visual_sinks = float(mass[visual].sum()), float(mass[on_sinks["visual"]].sum())
        others = torch.arange(self.length) > 0
        return LayerSinks(
            layer=number,
            judged=judged,
            tokens=tokens,
            counts={name: int((sinks & mask).sum()) for name, mask in self.masks.items()} if judged else {},
            mass={name: float(mass[mask].sum()) for name, mask in self.masks.items()},
            sink_mass={name: float(mass[mask].sum()) for name, mask in on_sinks.items() if bool(mask.any())},
            visual_sink_share=on_visual_sinks / on_image if bool(on_sinks["visual"].any()) and on_image > 0 else None,
            image_centric_heads=reading.centric,
            cosine={
                name: float(reading.cosine[mask & others].square().mean())
                for name, mask in self.masks.items()
                if bool((mask & others).any())
            },
            cosine_histogram=tuple(torch.histc(reading.cosine, bins=20, min=-1, max=1).int().tolist()),
            top=tuple(Activation(*found) for found in reading.top),
            median=reading.median,
        )

    def _received(self, reading: LayerReading) -> Tensor:
        return reading.weights.mean(dim=0) / self.sample.seen.clamp(min=1)

    def _tokens(self, number: int, reading: LayerReading, received: Tensor) -> tuple[SinkToken, ...]:
        criteria, seen = self.criteria, self.sample.seen
        # The last layer's states already turn towards the vocabulary.
        aligned = reading.cosine > criteria.cosine
        marks = {
            "D3": reading.massive,
            "D4": aligned if number < self.family.num_layers - 1 else torch.zeros_like(aligned),
            "D5": detectors.receives(received, seen, criteria.received, criteria.min_rows),
            "D6": detectors.low_value(
                reading.value_norms, received, seen, criteria.value_iqr, criteria.strong, criteria.min_rows
            ),
        }
        if self.channels_known:
            assert criteria.tau is not None
            marks = {"D1": reading.scores > criteria.tau, **marks}
        marked = {name: mark.tolist() for name, mark in marks.items()}
        values, added = _over_median(reading.value_norms), _over_median(reading.contributions)
        return tuple(
            self._token(position, label, marked, reading, received, values, added)
            for position, label in enumerate(detectors.label(marked, self.channels_known))
            if label is not None
        )

    def _token(
        self,
        position: int,
        label: str,
        marked: Mapping[str, Sequence[bool]],
        reading: LayerReading,
        received: Tensor,
        values: list[float | None],
        added: list[float | None],
    ) -> SinkToken:
        cell = self.cells.get(position)
        judged = int(self.sample.seen[position]) >= self.criteria.min_rows
        return SinkToken(
            position=position,
            segment=next(name for name, mask in self.masks.items() if bool(mask[position])),
            label=label,
            detectors=tuple(name for name in marked if marked[name][position]),
            text=self.texts[position] if cell is None else None,
            image=cell.image if cell else None,
            crop=cell.crop if cell else None,
            row=cell.row if cell else None,
            column=cell.column if cell else None,
            score=float(reading.scores[position]),
            channel=int(reading.channels[position]),
            peak=float(reading.peak[position]),
            cosine=float(reading.cosine[position]),
            received=float(received[position]) if judged else None,
            value_ratio=values[position],
            contribution_ratio=added[position] if judged else None,
        )

    # -- all layers ---------------------------------------------------------------------------------------------------

    def _magnets(self, layers: Sequence[LayerSinks]) -> tuple[Magnet, ...]:
        deep = range(max(self.first, self.family.num_layers // 2), self.family.num_layers)
        text = ~self.masks["image"] & (self.sample.seen >= self.criteria.min_rows)
        favoured = {n: (self.sample.layers[n].favoured >= self.criteria.magnet_rows) & text for n in deep}
        magnets = []
        for position in text.nonzero().flatten().tolist():
            where = tuple(number for number in deep if bool(favoured[number][position]))
            if not where or len(where) < self.criteria.magnet_layers * len(deep):
                continue
            if any(token.position == position for number in where for token in layers[number].sinks):
                continue
            received = [float(self._received(self.sample.layers[number])[position]) for number in where]
            magnets.append(Magnet(position, self.texts[position], where, sum(received) / len(received)))
        return tuple(magnets)

    def _images(self, layers: Sequence[LayerSinks]) -> tuple[ImageNorms, ...] | None:
        if self.sample.norms is None:
            return None
        images = []
        for ordinal in range(len(self.spans)):
            # Tokens that show no place, such as newlines, have no features of the tower behind them.
            places = [
                position
                for position, cell in self.cells.items()
                if cell.image == ordinal and not bool(self.sample.norms[position].isnan())
            ]
            if not places:
                continue
            norms = self.sample.norms[places]
            threshold = detectors.norm_threshold(norms, self.criteria.norm_iqr, self.criteria.norm_ratio)
            outliers = []
            for position, norm in zip(places, norms.tolist(), strict=True):
                if norm > threshold:
                    cell = self.cells[position]
                    where = tuple(x.layer for x in layers if any(token.position == position for token in x.sinks))
                    outliers.append(Outlier(position, cell.crop, cell.row, cell.column, norm, where))
            images.append(
                ImageNorms(ordinal, len(places), float(norms.median()), threshold, float(norms.max()), tuple(outliers))
            )
        return tuple(images)

    def _head_received(self) -> dict[int, float]:
        heads = [layer.weights / self.sample.seen.clamp(min=1) for layer in self.sample.layers]
        above = torch.cat(heads) > self.criteria.head_received
        share = above.float().mean(dim=0) * (self.sample.seen >= self.criteria.min_rows)
        return {position: float(share[position]) for position in share.nonzero().flatten().tolist()}

    def _judged_by_attention(self) -> bool:
        return bool((self.sample.seen >= self.criteria.min_rows).any())

    def _cells(self) -> dict[int, _Cell]:
        ordinal = {column: position for position, column in enumerate(self.sample.columns.tolist())}
        cells = {}
        for span in self.spans:
            places = zip(span.positions, span.tokens.crop, span.tokens.row, span.tokens.col, strict=True)
            for column, crop, row, col in (tuple(map(int, place)) for place in places):
                cells[ordinal[column]] = _Cell(span.image, crop, row, col)
        return cells


def _over_median(norms: Tensor) -> list[float | None]:
    median = float(norms.median())
    return [norm / median if median > 0 else None for norm in norms.tolist()]
