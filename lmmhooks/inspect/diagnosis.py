"""Attention sinks of a model on some prompts: one plain reading, judged by several detectors that have to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from torch import Tensor, nn

from lmmhooks.engines.runtime import Runtime, find_runtime
from lmmhooks.engines.sinks import discover_sink_dims
from lmmhooks.errors import MethodError
from lmmhooks.family import Family, resolve
from lmmhooks.inspect.detectors import Criteria
from lmmhooks.inspect.judging import Judge
from lmmhooks.inspect.pictures import pictures_of
from lmmhooks.inspect.reading import Reading, read
from lmmhooks.inspect.report import Channels, SinkReport
from lmmhooks.loading import identity
from lmmhooks.methods.attention.sinks import sink_threshold
from lmmhooks.methods.attention.var import Var

__all__ = ["sinks"]


def sinks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    processor: Any = None,
    *,
    sink_dims: Sequence[int] | None = None,
    criteria: Criteria | None = None,
    probe_rows: int | Literal["all"] = 32,
    rho: float = 0.8,
    min_visual: float = 0.2,
) -> SinkReport:
    """
    Find attention sinks, massive activations, encoder outliers and stop-word magnets.

    Costs one prefill, and eight short ones where sink channels have to be searched. The model is read without its
    patches and computes what it always does; patches that are attached return at the end, without the state of a
    generation under way.

    Parameters
    ----------
    model
        A transformers image-text-to-text model, wrapped or not.
    inputs
        What its processor made of the prompts: ``input_ids``, ``attention_mask``, pixels. A batch may be padded.
    processor
        Gives tokens their text, and makes the search for channels use real prompts with images. None: the one given to
        ``wrap``, if any; the search then runs on random token ids.
    sink_dims
        Channels of massive activations. None: searched on this checkpoint; empty: none, without a search.
    criteria
        Thresholds; None for the defaults.
    probe_rows
        Attention is read in that many of the last text rows of every sample, or in ``"all"`` rows.
    rho, min_visual
        A head looks at the image where at least ``min_visual`` of a row lies on it, at least ``rho`` of that outside
        visual sinks (by D1 alone). Defaults of `var`.

    Returns
    -------
    SinkReport
        See there; ``report.samples[0].findings`` says in words what was found and what was not.

    Raises
    ------
    MethodError
        A setting out of range.
    PromptError
        Prompts that cannot be read, such as one without text after its image.
    ModelError
        A model that lacks what is needed.
    """
    runtime = find_runtime(model) or Runtime(resolve(model))
    family = runtime.family
    criteria = criteria or Criteria()
    criteria = replace(criteria, tau=criteria.tau or sink_threshold(family.hidden_size))
    _check(family, sink_dims, probe_rows, rho, min_visual)
    if processor is None:
        processor = next((p.processor for p in reversed(runtime.patches) if p.processor is not None), None)
    channels = _channels(runtime, processor, sink_dims)
    rows = "all" if probe_rows == "all" else f"instruction:{probe_rows}"
    reading = read(
        runtime, inputs, dims=channels.dims or None, criteria=criteria, rows=rows, rho=rho, min_visual=min_visual
    )
    texts = _texts(processor, inputs["input_ids"], reading)
    samples = tuple(
        Judge(family, reading, criteria, index, bool(channels.dims), tokens).judge()
        for index, tokens in enumerate(texts)
    )
    settings = {**asdict(criteria), "probe_rows": probe_rows, "rho": rho, "min_visual": min_visual}
    return SinkReport(identity(model), channels, settings, samples, pictures_of(family, reading, processor))


def _check(family: Family, dims: Sequence[int] | None, rows: Any, rho: float, min_visual: float) -> None:
    if dims is not None and not all(0 <= dim < family.hidden_size for dim in dims):
        raise MethodError(f"sinks: sink_dims is {tuple(dims)}; channels of this model lie in [0, {family.hidden_size})")
    if rows != "all" and not (isinstance(rows, int) and rows >= 1):
        raise MethodError(f"sinks: probe_rows is {rows!r}; it must be a number of rows from 1 on, or 'all'")
    if rho < 0 or not 0 <= min_visual <= 1:
        raise MethodError(f"sinks: rho is {rho} and min_visual {min_visual}; they must be at least 0, and in [0, 1]")


def _channels(runtime: Runtime, processor: Any, given: Sequence[int] | None) -> Channels:
    family = runtime.family
    published = Var.defaults_for(family).get("sink_dims")
    if given is not None:
        return Channels(tuple(given), (), "given", published, {})
    usable = processor if getattr(processor, "chat_template", None) is not None else None
    found = discover_sink_dims(runtime, usable)
    return Channels(found.dims, found.visual_dims, "measured", published, found.evidence)


def _texts(processor: Any, input_ids: Tensor, reading: Reading) -> list[list[str | None]]:
    """Text of every valid token; None without a tokenizer."""
    tokenizer = getattr(processor, "tokenizer", None)
    rows = zip(input_ids.cpu(), reading.samples, strict=True)
    return [
        [None if tokenizer is None else tokenizer.decode([token]) for token in ids[sample.columns].tolist()]
        for ids, sample in rows
    ]
