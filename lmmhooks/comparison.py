"""One prompt answered by a model as it is and under methods: texts, probabilities, where it looks, what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.engines.runtime import Runtime, find_runtime
from lmmhooks.errors import MethodError
from lmmhooks.methods.registry import resolve
from lmmhooks.pages import data_uri, write_page
from lmmhooks.patch import Patch, wrap
from lmmhooks.prompting import build_inputs, open_image
from lmmhooks.stats import Stats

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

__all__ = ["Comparison", "Run", "Token", "compare"]

BASELINE = "baseline"


@dataclass(frozen=True)
class Token:
    """A generated token: its text and the probability the (patched) model gave it, before warpers."""

    text: str
    probability: float


@dataclass(frozen=True)
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
        Its tokens with probabilities; none, like all attention, for an answer put together from several generations.
    visual_share
        Per decoder layer, attention mass of the last prompt row on visual tokens (mean over heads, 0 to 1).
    image_map
        Mean over layers and heads of that row's attention, on the token grid ``[rows][columns]`` of the first image's
        first crop; cells whose token is not there are None. None without an image or without a known grid.
    kept
        Same grid: whether the token reaches the last decoder layer.
    first_token_ms
        Time from the call of ``generate`` to the first logits, image encoding included; None for an answer put
        together, which has no first token before it is there.
    total_ms
        Time of the whole call.
    stats
        See `lmmhooks.stats.Stats`; of the last prompt of an answer put together, but with the FLOPs of all.
    passes
        Generations that the answer took.
    """

    name: str
    text: str
    tokens: tuple[Token, ...]
    visual_share: tuple[float, ...]
    image_map: tuple[tuple[float | None, ...], ...] | None
    kept: tuple[tuple[bool, ...], ...] | None
    first_token_ms: float | None
    total_ms: float
    stats: Stats
    passes: int = 1


@dataclass(frozen=True)
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
    """

    prompt: str
    image: Image.Image | None
    runs: tuple[Run, ...]

    @property
    def baseline(self) -> Run:
        return self.runs[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values; the image is left out."""
        return {"prompt": self.prompt, "runs": [{**asdict(run), "stats": run.stats.to_dict()} for run in self.runs]}

    def to_html(self, path: str | PathLike[str]) -> Path:
        """
        Write one self-contained page: answers with token probabilities, image with attention, cost.

        Raises
        ------
        LmmhooksError
            The file cannot be written.
        """
        return write_page(
            "comparison.html.j2",
            path,
            comparison=self,
            pictures=[self._picture(run) for run in self.runs],
            original=None if self.image is None else data_uri(self.image),
        )

    def _picture(self, run: Run) -> str | None:
        """The image darkened where the run does not look; tokens that were removed are grey."""
        if self.image is None or run.image_map is None or run.kept is None:
            return None
        values = torch.tensor([[0.0 if v is None else v for v in row] for row in run.image_map])
        scaled = (values / values.max().clamp_min(1e-12)).sqrt()
        light = (0.25 + 0.75 * scaled) * 255
        size = self.image.size
        mask = Image.fromarray(light.byte().numpy(), mode="L").resize(size, Image.Resampling.BILINEAR)
        lit = Image.composite(self.image, Image.new("RGB", size), mask)
        kept = Image.fromarray((torch.tensor(run.kept).byte() * 255).numpy(), mode="L")
        kept = kept.resize(size, Image.Resampling.NEAREST)
        return data_uri(Image.composite(lit, Image.new("RGB", size, (128, 128, 128)), kept))


def compare(
    model: nn.Module, processor: Any, image: Any, prompt: str, methods: Sequence[Any], **generate_kwargs: Any
) -> Comparison:
    """
    Answer one prompt with the model as it is and under each of several methods.

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
        Variants: a method each (see `lmmhooks.methods.resolve`), or a list of methods that act together.
    **generate_kwargs
        Passed to ``generate``; ``max_new_tokens`` defaults to 64, decoding to greedy.

    Raises
    ------
    LmmhooksError
        The model is already wrapped, or a method, image or prompt cannot be used.
    """
    if find_runtime(model) is not None:
        raise MethodError("the model is already wrapped, so there is no baseline; call lmmhooks.unwrap(model) first")
    images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    opened = [open_image(item) for item in images]
    variants = [[resolve(m) for m in (v if isinstance(v, (list, tuple)) else [v])] for v in methods]
    weight = next(model.parameters())
    inputs = build_inputs(processor, opened, prompt, weight.device, weight.dtype)
    settings = {"max_new_tokens": 64, "do_sample": False} | generate_kwargs
    runs = []
    # The identity goes through every hook and changes nothing: the baseline's attention can be read like the others'.
    for name, variant in [(BASELINE, []), *((" + ".join(m.spec() for m in v), v) for v in variants)]:
        with wrap(model, "attention-identity", *variant, processor=processor) as patch:
            if patch.puts_answers_together:
                runs.append(_put_together(patch, opened, prompt, name, settings))
            else:
                runs.append(_run(find_runtime(model), processor, inputs, name, settings))
    return Comparison(prompt, opened[0] if opened else None, tuple(runs))


def _run(runtime: Runtime | None, processor: Any, inputs: dict[str, Any], name: str, settings: dict[str, Any]) -> Run:
    assert runtime is not None, "the model has just been wrapped"
    family = runtime.family
    reader = _LastRow(runtime)
    model: Any = family.model
    with runtime.probing(reader.probes), _clock(model) as ticks, torch.inference_mode():
        out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True, output_logits=True)
        _wait(family.text_model.device)
        end = time.perf_counter()
        # Read before the probes go: changing what is attached drops the state of the prompt.
        stats = Stats.of(family, runtime.last_state)
        image_map, kept = reader.grids()
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    scores = model.compute_transition_scores(
        out.sequences, out.logits, getattr(out, "beam_indices", None), normalize_logits=True
    )
    special = set(processor.tokenizer.all_special_ids)
    tokens = tuple(
        Token(processor.tokenizer.decode([token]), float(score.exp()))
        for token, score in zip(new.tolist(), scores[0], strict=False)
        if token not in special
    )
    return Run(
        name=name,
        text=processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        tokens=tokens,
        visual_share=tuple(reader.shares),
        image_map=image_map,
        kept=kept,
        first_token_ms=(ticks[1] - ticks[0]) * 1000,
        total_ms=(end - ticks[0]) * 1000,
        stats=stats,
    )


def _put_together(patch: Patch, images: Sequence[Any], prompt: str, name: str, settings: dict[str, Any]) -> Run:
    start = time.perf_counter()
    text = patch.answer(list(images) or None, prompt, **settings)
    total = 1000 * (time.perf_counter() - start)
    stats, cost = patch.stats, patch.answer_cost
    stats = replace(stats, prefill_flops=cost.prefill_flops or stats.prefill_flops)
    return Run(name, text, (), (), None, None, None, total, stats, cost.passes)


class _LastRow:
    """Attention of the last prompt row of the first row of the batch, on the prompt as given, layer by layer."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.rows: list[Tensor] = []
        self.shares: list[float] = []
        self.present: Tensor | None = None
        self.probes = [DecoderProbe(layer, "last", self._receiver(layer)) for layer in range(runtime.family.num_layers)]

    def _receiver(self, layer: int) -> Any:
        def receive(weights: Tensor, real: Tensor) -> None:
            state = self.runtime.last_state
            stage = state.stage_at(layer)
            seen = weights[0, :, 0].mean(dim=0).cpu()
            index = torch.arange(len(seen)) if stage.index is None else stage.index[0].cpu()
            inside = index >= 0
            row = torch.zeros(state.layout.length).index_add_(0, index[inside], seen[inside])
            self.present = torch.zeros(len(row), dtype=torch.bool)
            self.present[index[inside]] = True
            self.rows.append(row)
            self.shares.append(float(row[state.layout.visual[0].cpu()].sum()))

        return receive

    def grids(self) -> tuple[Any, Any]:
        spans = self.runtime.last_state.layout.spans_of(0)
        if not spans or not spans[0].tokens.grids or self.present is None:
            return None, None
        span = spans[0]
        rows, columns = span.tokens.grids[0]
        mean = torch.stack(self.rows).mean(dim=0)
        values: list[list[float | None]] = [[None] * columns for _ in range(rows)]
        kept = [[False] * columns for _ in range(rows)]
        tokens = span.tokens
        for position, crop, r, c in zip(span.positions, tokens.crop, tokens.row, tokens.col, strict=True):
            if int(crop) == 0:
                values[r][c] = float(mean[position])
                kept[r][c] = bool(self.present[position])
        return tuple(map(tuple, values)), tuple(map(tuple, kept))


@contextmanager
def _clock(model: nn.Module) -> Iterator[list[float]]:
    """Times: the start, then the end of every forward."""
    device = next(model.parameters()).device
    attachments = Attachments()

    def tick(*_: Any) -> None:
        _wait(device)
        ticks.append(time.perf_counter())

    attachments.hook(model, tick, "clock")
    _wait(device)
    ticks = [time.perf_counter()]
    try:
        yield ticks
    finally:
        attachments.undo()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
