"""
Runs a comparison: every variant answers freely while it is timed, and is then led along the baseline's answer.

Reading attention costs time and switches some engines to other, equal ways, so that it has passes of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lmmhooks.comparison.places import cells_of
from lmmhooks.comparison.result import BASELINE, Comparison, Run, Token, compared
from lmmhooks.comparison.trace import Trace, lead
from lmmhooks.comparison.words import yes_no
from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.runtime import Runtime, find_runtime
from lmmhooks.errors import LmmhooksError, MethodError
from lmmhooks.inspect.maps.result import SPANS
from lmmhooks.loading import identity
from lmmhooks.methods.registry import resolve
from lmmhooks.patch import Patch, wrap
from lmmhooks.prompting import as_images, build_inputs, open_image
from lmmhooks.stats import Stats

__all__ = ["compare"]

IDENTITY = "attention-identity"
"""Goes through every hook and changes nothing: the baseline's attention can be read like that of methods."""


def compare(
    model: nn.Module, processor: Any, image: Any, prompt: str, methods: Sequence[Any], **generate_kwargs: Any
) -> Comparison:
    """
    Answer one prompt with the model as it is and under each of several methods.

    Every variant generates twice or three times: freely, and led along the baseline's answer and its own, where
    attention and probabilities are read. How tokens are drawn concerns the free answer only.

    Parameters
    ----------
    model
        A model without patches.
    processor
        Its processor.
    image
        PIL image, path, a sequence of them, or None.
    prompt
        The question.
    methods
        Variants: a method each (see `lmmhooks.methods.resolve`), or a list of methods that act together. May be empty:
        the baseline alone.
    **generate_kwargs
        Passed to ``generate``; ``max_new_tokens`` defaults to 64, decoding to greedy.

    Raises
    ------
    LmmhooksError
        The model is already wrapped, or a method, image or prompt cannot be used.
    """
    if find_runtime(model) is not None:
        raise MethodError("the model is already wrapped, so there is no baseline; call lmmhooks.unwrap(model) first")
    images = [open_image(item) for item in as_images(image)]
    variants = [[resolve(m) for m in (v if isinstance(v, (list, tuple)) else [v])] for v in methods]
    weight = next(model.parameters())
    inputs = build_inputs(processor, images, prompt, weight.device, weight.dtype)
    question = _Question(
        processor, images, prompt, inputs, {"max_new_tokens": 64, "do_sample": False} | generate_kwargs
    )
    named = [(BASELINE, [resolve(IDENTITY)]), *((" + ".join(m.spec() for m in v), v) for v in variants)]
    runs: list[Run] = []
    for name, variant in named:
        with wrap(model, *variant, processor=processor) as patch:
            runtime = find_runtime(model)
            assert runtime is not None, "the model has just been wrapped"
            # Methods without any effect attach nothing that could be read; beside others it would cost time.
            with nullcontext() if runtime.methods() else wrap(model, IDENTITY):
                answer = _answered if runtime.answering is None else _asked
                runs.append(answer(runtime, patch, question, name))
    traces = [run.along for run in runs if run.along is not None]
    asked = yes_no([run.text for run in runs], processor.tokenizer)
    if asked is not None:
        runs = [replace(run, margin=_margin(run.along, *asked)) for run in runs]
    if traces:
        runs = [runs[0], *(_against(runs[0].along, run) for run in runs[1:])]
    return Comparison(prompt, images[0] if images else None, tuple(runs), tuple(images), _identity(model))


@dataclass
class _Question:
    """What every variant is asked, and what the baseline said."""

    processor: Any
    images: list[Image.Image]
    prompt: str
    inputs: dict[str, Any]
    settings: dict[str, Any]
    answer: list[int] = field(default_factory=list)
    """Tokens of the baseline's answer."""


def _answered(runtime: Runtime, patch: Patch, question: _Question, name: str) -> Run:
    """A variant that generates token by token."""
    model: Any = runtime.family.model
    with _meter(runtime) as meter, torch.inference_mode():
        out = model.generate(
            **question.inputs,
            **question.settings,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
    stats = Stats.of(runtime.family, runtime.last_state)
    sequences = out.sequences[:1]
    new = sequences[0, question.inputs["input_ids"].shape[1] :].tolist()
    beams = getattr(out, "beam_indices", None)
    scores = model.compute_transition_scores(out.sequences, out.logits, beams, normalize_logits=True)
    tokenizer = question.processor.tokenizer
    special = set(tokenizer.all_special_ids)
    tokens = tuple(
        Token(tokenizer.decode([token]), float(score.exp()))
        for token, score in zip(new, scores[0], strict=False)
        if token not in special
    )
    new = _ended(new, model.generation_config.eos_token_id)
    if name == BASELINE:
        question.answer = new
    along, own, note = _led(runtime, question, new)
    image_map, kept = _first_grid(along)
    share = along.shares[0, :, SPANS.index("visual")] if along else torch.empty(0)
    cells = cells_of(runtime.family, along.spans, question.images, question.processor) if along else ()
    return Run(
        name=name,
        text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        tokens=tokens,
        visual_share=tuple(share.nan_to_num(0.0).tolist()),
        image_map=image_map,
        kept=kept,
        first_token_ms=meter.first_ms,
        total_ms=meter.total_ms,
        stats=stats,
        num_tokens=len(new),
        passes=meter.passes,
        peak_bytes=meter.peak_bytes,
        along=along,
        own=own,
        cells=cells,
        note=note,
    )


def _asked(runtime: Runtime, patch: Patch, question: _Question, name: str) -> Run:
    """A variant that answers by itself, in several generations."""
    with _meter(runtime) as meter:
        text = patch.answer(question.images, question.prompt, **question.settings)
    engine, stats = runtime.answering, Stats.of(runtime.family, runtime.last_state)
    stats = replace(stats, prefill_flops=patch.answer_cost.prefill_flops or stats.prefill_flops)
    return Run(
        name=name,
        text=text,
        tokens=(),
        visual_share=(),
        image_map=None,
        kept=None,
        first_token_ms=meter.first_ms,
        total_ms=meter.total_ms,
        stats=stats,
        passes=meter.passes,
        peak_bytes=meter.peak_bytes,
        looked_at=tuple(getattr(engine, "looked_at", ())),
        note="puts its answer together from several generations, so there is no one answer to be led along",
    )


def _led(runtime: Runtime, question: _Question, new: list[int]) -> tuple[Trace | None, Trace | None, str]:
    """Led along the baseline's answer and along its own; what prevents it, if something does."""
    if not question.answer:
        return None, None, "there is no token to be led along"
    lead_along = partial(lead, runtime, question.inputs, processor=question.processor)
    try:
        along = lead_along(question.answer)
        own = along if new == question.answer or not new else lead_along(new, keep_distribution=False)
    except LmmhooksError as error:
        return None, None, f"cannot be led along an answer: {error}"
    return along, own, ""


def _against(baseline: Trace | None, run: Run) -> Run:
    if baseline is None or run.along is None:
        return run
    return replace(run, difference=compared(baseline, run.along))


def _margin(trace: Trace | None, yes: Sequence[int], no: Sequence[int]) -> float | None:
    if trace is None or trace.distribution is None:
        return None
    first = trace.distribution[0]
    margin = float(first[list(yes)].max() - first[list(no)].max())
    # One of them, or both, may be ruled out.
    return margin if abs(margin) < float("inf") else None


def _ended(tokens: list[int], ends: Any) -> list[int]:
    """Tokens up to and including the first end token: what follows it is padding."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    stop = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return tokens[: stop + 1]


def _first_grid(trace: Trace | None) -> tuple[Any, Any]:
    """Attention of the last prompt row on the first crop of the first image, and which of its tokens stay."""
    if trace is None or not trace.spans or not trace.spans[0].tokens.grids:
        return None, None
    tokens = trace.spans[0].tokens
    rows, columns = tokens.grids[0]
    mean = trace.visual[0].nan_to_num(0.0).mean(dim=0)
    values: list[list[float | None]] = [[None] * columns for _ in range(rows)]
    kept = [[False] * columns for _ in range(rows)]
    for token, (crop, r, c) in enumerate(zip(tokens.crop, tokens.row, tokens.col, strict=True)):
        if int(crop) == 0:
            values[r][c] = float(mean[token])
            kept[r][c] = bool(trace.present[-1, token])
    return tuple(map(tuple, values)), tuple(map(tuple, kept))


@dataclass
class _Meter:
    """Of one answer."""

    start: float
    first: float | None = None
    end: float = 0.0
    passes: int = 0
    peak_bytes: int | None = None
    depth: int = 0
    """Forwards under way: branches are read inside the forward of the caller."""

    @property
    def first_ms(self) -> float:
        return ((self.end if self.first is None else self.first) - self.start) * 1000

    @property
    def total_ms(self) -> float:
        return (self.end - self.start) * 1000


@contextmanager
def _meter(runtime: Runtime) -> Iterator[_Meter]:
    """Time, forwards that read more than one token, and memory."""
    model = runtime.family.model
    device = next(model.parameters()).device
    attachments = Attachments()

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        meter.depth += 1
        tokens = args[0] if args else kwargs.get("input_ids")
        if isinstance(tokens, Tensor) and tokens.shape[1] > 1:
            meter.passes += 1

    def tick(*_: Any) -> None:
        meter.depth -= 1
        if meter.first is None and not meter.depth:
            _wait(device)
            meter.first = time.perf_counter()

    attachments.pre_hook(model, count, "passes", first=True)
    attachments.hook(model, tick, "clock", always=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _wait(device)
    meter = _Meter(time.perf_counter())
    try:
        yield meter
        _wait(device)
        meter.end = time.perf_counter()
        if device.type == "cuda":
            meter.peak_bytes = torch.cuda.max_memory_allocated(device)
    finally:
        attachments.undo()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _identity(model: Any) -> dict[str, Any]:
    weight = next(model.parameters())
    return {
        **identity(model),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "backend": str(model.config._attn_implementation),
    }
