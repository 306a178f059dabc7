"""
One plain reading of a batch of prompts, reduced on the way to what the detectors need.

Hidden states and attention rows are looked at while they pass and never kept: a few numbers per position and layer
stay, per sample and without padding, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lmmhooks.engines.attention import AttentionEngine
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.engines.probing import place
from lmmhooks.engines.state import PromptState, select_rows
from lmmhooks.errors import PromptError
from lmmhooks.inspect import detectors
from lmmhooks.inspect.detectors import Criteria
from lmmhooks.layout import Layout
from lmmhooks.methods.attention.var import image_centric

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.vision import VisionInputs

__all__ = ["LayerReading", "Reading", "SampleReading", "read"]

NORMS = "feature norms"


@dataclass
class LayerReading:
    """
    One decoder layer, one sample of N valid tokens, H heads, R probe rows.

    Attributes
    ----------
    scores
        ``[N]`` D1, over the sink channels; over all channels (D2) where none are known.
    channels
        ``[N]`` channel of each position's largest magnitude.
    massive, peak, median
        D3: ``[N]`` bool, largest magnitude ``[N]``, and median magnitude of the layer.
    cosine
        ``[N]`` D4.
    top
        Largest activations: (value, position, channel).
    weights
        ``[H, N]`` attention on every key, sum over the probe rows.
    favoured
        ``[N]`` share of the rows that can see a key and favour it.
    centric
        Heads that look at the image, mean over the probe rows; None without image.
    value_norms, contributions
        ``[N]`` D6 and D7.
    """

    scores: Tensor
    channels: Tensor
    massive: Tensor
    peak: Tensor
    median: float
    cosine: Tensor
    top: list[tuple[float, int, int]]
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    favoured: Tensor = field(default_factory=lambda: torch.empty(0))
    centric: float | None = None
    value_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    contributions: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class SampleReading:
    """
    One sample.

    Attributes
    ----------
    columns
        Long ``[N]``: column of every valid token in the batch.
    seen
        Long ``[N]``: probe rows that can see a key.
    num_rows
        Probe rows R.
    layers
        One entry per decoder layer.
    norms
        ``[N]`` norm of the vision features behind a visual token (RMS over merged patches), NaN elsewhere; None if the
        images were encoded before.
    """

    columns: Tensor
    seen: Tensor
    num_rows: int
    layers: list[LayerReading] = field(default_factory=list)
    norms: Tensor | None = None


@dataclass
class Reading:
    """A batch: its layout, the encoder calls behind it, and what was read of every sample."""

    layout: Layout
    vision: list[VisionInputs]
    samples: list[SampleReading]


def read(
    runtime: Runtime,
    inputs: Mapping[str, Any],
    *,
    dims: Sequence[int] | None,
    criteria: Criteria,
    rows: str,
    rho: float,
    min_visual: float,
) -> Reading:
    """
    Read a batch once with the unpatched model.

    Parameters
    ----------
    runtime
        Of the model; its patches are suspended meanwhile.
    inputs
        As ``model(**inputs)`` takes them.
    dims
        Sink channels; None where none are known.
    criteria
        Thresholds; ``tau`` filled in.
    rows
        Row selection of the probes, such as ``"instruction:32"``.
    rho, min_visual
        What counts as a head that looks at the image; see `lmmhooks.methods.attention.var.image_centric`.
    """
    family = runtime.family
    cache = DynamicCache(config=family.text_config)
    reader = _Reader(runtime, cache, dims, criteria, rows, rho, min_visual)
    with runtime.suspended() as attachments, torch.inference_mode():
        for index, layer in enumerate(family.layers):
            attachments.pre_hook(layer, _bind(partial(reader.see_input, index)), f"input of layer {index}")
        feature_layer = family.vision_layers[family.feature_layer]
        attachments.hook(feature_layer, reader.see_features, f"output of vision layer {family.feature_layer}")
        probes = [DecoderProbe(i, rows, partial(reader.see_weights, i)) for i in range(family.num_layers)]
        AttentionEngine(runtime, [], probes).attach(attachments)
        family.model(**{**inputs, "past_key_values": cache, "use_cache": True})
        return reader.finish()


class _Reader:
    def __init__(
        self,
        runtime: Runtime,
        cache: DynamicCache,
        dims: Sequence[int] | None,
        criteria: Criteria,
        rows: str,
        rho: float,
        min_visual: float,
    ) -> None:
        self.runtime, self.cache, self.dims, self.criteria = runtime, cache, dims, criteria
        self.rows, self.rho, self.min_visual = rows, rho, min_visual
        self.samples: list[SampleReading] = []
        self.vision: list[VisionInputs] = []
        self.layout: Layout | None = None

    def see_features(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Squared feature norms, in a form that families turn into values per token."""
        features = output[0] if isinstance(output, tuple) else output
        # Packed towers have no batch dimension.
        features = features if features.dim() == 3 else features[None]
        squares = features.float().square().sum(dim=-1, keepdim=True)
        if self.runtime.family.has_cls:
            squares = squares[:, 1:]
        # Where patches are merged the mean is taken of squares: the norm of the features the merger joins.
        self.runtime.readings.setdefault(NORMS, []).append(squares)

    def see_input(self, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            self._begin()
        for index, sample in enumerate(self.samples):
            x = hidden[index, sample.columns.to(hidden.device)].float()
            big, peak, median = detectors.massive(x, self.criteria.magnitude, self.criteria.ratio)
            sample.layers.append(
                LayerReading(
                    scores=detectors.sink_scores(x, self.dims).cpu(),
                    channels=x.abs().argmax(dim=-1).cpu(),
                    massive=big.cpu(),
                    peak=peak.cpu(),
                    median=median,
                    cosine=detectors.cosine_to_first(x).cpu(),
                    top=detectors.top_activations(x),
                )
            )

    def see_weights(self, layer: int, weights: Tensor, real: Tensor) -> None:
        assert self.layout is not None
        for index, sample in enumerate(self.samples):
            seen = weights[index][:, real[index]][:, :, sample.columns.to(weights.device)]
            if not seen.shape[1]:
                continue
            reading = sample.layers[layer]
            share = detectors.magnet_share(seen.mean(dim=0), sample.seen.to(seen.device), self.criteria.received).cpu()
            centric = self._centric(index, layer, seen)
            # Long selections arrive in blocks of rows.
            first = not reading.weights.numel()
            reading.weights = seen.sum(dim=1).cpu() + (0 if first else reading.weights)
            reading.favoured = share + (0 if first else reading.favoured)
            if centric is not None:
                reading.centric = centric + (reading.centric or 0.0)

    def finish(self) -> Reading:
        assert self.layout is not None
        family = self.runtime.family
        norms = self._norms()
        for index, sample in enumerate(self.samples):
            sample.norms = None if norms is None else norms[index, sample.columns]
            for layer, reading in enumerate(sample.layers):
                values = self.cache.layers[layer].values[index]
                values = values[:, sample.columns.to(values.device)]
                received = (reading.weights / max(sample.num_rows, 1)).to(values.device)
                project = family.output_projection_of(family.layers[layer])
                reading.value_norms = values.float().square().sum(dim=(0, 2)).sqrt().cpu()
                reading.contributions = detectors.contribution(received, values, project).cpu()
        return Reading(self.layout, self.vision, self.samples)

    def _begin(self) -> None:
        state = self.runtime.current
        assert isinstance(state, PromptState)
        self.layout, self.vision = state.layout, list(state.vision)
        rows, valid = select_rows(state.layout, self.rows).cpu(), state.layout.valid.cpu()
        for index in range(state.layout.batch):
            columns = valid[index].nonzero().flatten()
            chosen = rows[index, columns].long()
            if not len(columns) or not int(chosen.sum()):
                raise PromptError(
                    f"row {index} has no text after its image, so there are no rows whose attention could be read; "
                    "put a question after the image"
                )
            # A row sees itself and what is before it.
            seen = chosen.flip(0).cumsum(dim=0).flip(0)
            self.samples.append(SampleReading(columns, seen, int(chosen.sum())))

    def _centric(self, index: int, layer: int, weights: Tensor) -> float | None:
        assert self.layout is not None
        assert self.criteria.tau is not None
        sample = self.samples[index]
        reading = sample.layers[layer]
        visual = self.layout.visual[index].cpu()[sample.columns]
        if not bool(visual.any()):
            return None
        # As the method decides: by the hidden state alone, before any attention is known.
        sinks = reading.scores > self.criteria.tau if self.dims else torch.zeros_like(visual)
        device = weights.device
        looking = image_centric(
            weights[None], sinks[None].to(device), visual[None].to(device), self.rho, self.min_visual
        )
        return float(looking.sum()) / sample.num_rows

    def _norms(self) -> Tensor | None:
        assert self.layout is not None
        if not self.vision or any(NORMS not in call.probes for call in self.vision):
            return None
        family = self.runtime.family
        per_image = {call.modality: family.tower_to_tokens(call.probes[NORMS], call) for call in self.vision}
        return place(self.layout, per_image)[..., 0].sqrt().cpu()


def _bind(see: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda module, args, kwargs: see(args[0] if args else kwargs["hidden_states"])
