"""Charts and tables of a comparison, for its page; every curve of a chart has the same axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lmmhooks.comparison.measures import carve_entropy
from lmmhooks.comparison.result import Comparison, Run
from lmmhooks.comparison.trace import Trace
from lmmhooks.inspect.maps.result import CARVE_LAYERS, SPANS
from lmmhooks.pages import Areas, Chart, areas, chart

__all__ = ["Table", "charts", "cost_table", "headline", "remarks", "stacks", "token_tables"]

KIB, MIB = 1 << 10, 1 << 20
VISUAL = SPANS.index("visual")


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def headline(comparison: Comparison) -> Table:
    """One row per variant: what it answers, how far it is from the baseline, what it looks at, what it costs."""
    carve = any(run.along and carve_entropy(run.along.entropy) is not None for run in comparison.runs)
    margins = any(run.margin is not None for run in comparison.runs)
    several = len(comparison.runs) > 1
    columns = ["variant", "answer", *["log p, sum of differences"] * several, "attention on image", "entropy"]
    columns += [f"entropy, layers {CARVE_LAYERS[0]} to {CARVE_LAYERS[-1]}, last token"] * carve
    columns += ["log p(yes) - log p(no)"] * margins
    columns += ["tokens", "ms"]
    rows = []
    for run in comparison.runs:
        trace = run.along
        row = [
            run.name,
            run.text or "(empty)",
            *(["-" if run.difference is None else _signed(float(run.difference.dlogp.sum()))] * several),
            "-" if trace is None else _number(trace.visual_share, ".3f"),
            "-" if trace is None else _number(float(trace.entropy.nanmean()), ".2f"),
        ]
        row += [_number(None if trace is None else carve_entropy(trace.entropy), ".2f")] * carve
        row += [_signed(run.margin)] * margins
        row += ["-" if run.num_tokens is None else str(run.num_tokens), f"{run.total_ms:.0f}"]
        rows.append(row)
    return Table(columns, rows)


def cost_table(comparison: Comparison) -> Table:
    """What every variant cost; a dash where it is not known."""
    columns = ["variant", "visual tokens per layer", "passes", "first token", "per token", "whole answer", "tokens"]
    columns += ["prompt FLOPs (theory)", "KV cache"]
    told = any(run.peak_bytes is not None for run in comparison.runs)
    columns += ["peak memory"] * told
    base = comparison.baseline.stats.prefill_flops or math.nan
    rows = [
        [
            run.name,
            f"{run.stats.average_visual:.1f}",
            str(run.passes),
            f"{run.first_token_ms:.1f} ms",
            "-" if run.token_ms is None else f"{run.token_ms:.1f} ms",
            f"{run.total_ms:.1f} ms",
            "-" if run.num_tokens is None else str(run.num_tokens),
            _number(run.stats.prefill_flops / base, ".3f"),
            f"{run.stats.kv_bytes / KIB:.1f} KiB"
            if run.stats.kv_bytes < MIB
            else f"{run.stats.kv_bytes / MIB:.1f} MiB",
            *(["-" if run.peak_bytes is None else f"{run.peak_bytes / MIB:.0f} MiB"] * told),
        ]
        for run in comparison.runs
    ]
    return Table(columns, rows)


def stacks(comparison: Comparison) -> list[Areas]:
    """Attention by part of the sequence, per layer, for every variant that was led along the baseline's answer."""
    drawn = []
    for run in comparison.runs:
        if run.along is None or not run.along.shares.numel():
            continue
        mean = run.along.shares.nanmean(dim=0)
        if not bool(mean.isnan().any()):
            drawn.append(areas(run.name, {name: mean[:, i].tolist() for i, name in enumerate(SPANS)}))
    return drawn


def charts(comparison: Comparison) -> list[Chart]:
    """Curves per layer and per token, all variants on one axis."""
    traced = [(run, run.along) for run in comparison.runs if run.along is not None]
    others = [run for run in comparison.runs if run.difference is not None]

    def of(value: Callable[[Trace], Tensor]) -> dict[str, list[float | None]]:
        return {run.name: _known(value(trace)) for run, trace in traced}

    names = [run.name for run in comparison.runs]
    by_layer = partial(chart, names=names)
    by_token = partial(chart, names=names, axis="token", first=1)
    found: list[Chart | None] = []
    removed = any(layer.visual_kept != layer.visual_in for run in comparison.runs for layer in run.stats.layers)
    if traced and traced[0][1].spans:
        layerwise = of(lambda trace: trace.shares[..., VISUAL].nanmean(dim=0))
        found += [
            by_layer("Attention on the image", layerwise),
            by_layer("Attention on the image, difference to the baseline", _differences(layerwise, others)),
            by_token("Attention on the image, by token", of(lambda t: t.shares[..., VISUAL].nanmean(dim=1))),
            by_layer("Entropy of the attention on the image", of(lambda trace: trace.entropy.nanmean(dim=0))),
            by_token("Entropy, by token", of(lambda trace: trace.entropy.nanmean(dim=1))),
            by_layer("Visual tokens kept, share of the prompt's", _kept(comparison.runs), steps=True)
            if removed
            else None,
        ]
    found += [
        by_token("Log-probability of the baseline's tokens, difference", _apart(others, "dlogp")),
        by_token("KL(baseline, variant)", _apart(others, "kl")),
        by_token("KL(variant, baseline)", _apart(others, "kl_reverse")),
    ]
    return [each for each in found if each is not None]


def _apart(runs: Sequence[Run], name: str) -> dict[str, list[float | None]]:
    return {run.name: _known(getattr(run.difference, name)) for run in runs}


def _differences(curves: dict[str, list[float | None]], others: Sequence[Run]) -> dict[str, list[float | None]]:
    base = next(iter(curves.values()))
    return {
        run.name: [None if a is None or b is None else a - b for a, b in zip(curves[run.name], base, strict=True)]
        for run in others
    }


def _kept(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    return {
        run.name: [
            layer.visual_kept[0] / layer.visual_in[0] if layer.visual_in[0] else None for layer in run.stats.layers
        ]
        for run in runs
    }


def token_tables(comparison: Comparison) -> list[tuple[str, Table]]:
    """Per variant, every token of the baseline's answer with what the variant thinks of it."""
    base = comparison.baseline.along
    if base is None:
        return []
    columns = ("", "token", "p baseline", "p variant", "difference of log p", "rank", "KL(B, X)", "KL(X, B)")
    tables = []
    for run in comparison.runs:
        if run.difference is None or run.along is None:
            continue
        apart = run.difference
        rows = [
            [
                str(t + 1),
                text or "(end)",
                f"{float(base.logp[t].exp()):.3f}",
                f"{float(run.along.logp[t].exp()):.3f}",
                _signed(float(apart.dlogp[t])),
                str(int(run.along.rank[t])),
                _number(float(apart.kl[t]), ".4f"),
                _number(float(apart.kl_reverse[t]), ".4f"),
            ]
            for t, text in enumerate(base.texts)
        ]
        tables.append((run.name, Table(columns, rows)))
    return tables


def remarks(comparison: Comparison) -> list[str]:
    """What curves cannot show: where a variant leaves the baseline's answer, and what is infinite."""
    said = []
    for run in comparison.runs:
        apart = run.difference
        if apart is None:
            continue
        step = apart.diverges_at
        said.append(
            f"{run.name}: "
            + (
                "at no token of the baseline's answer would it choose another."
                if step is None
                else f"at token {step + 1} it would choose another than the baseline."
            )
        )
        for name, values in (("KL(baseline, variant)", apart.kl), ("KL(variant, baseline)", apart.kl_reverse)):
            if num := int(values.isinf().sum()):
                said[-1] += f" {name} is infinite at {num} of {len(values)} tokens, which the curve leaves out."
    return said


def _known(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _number(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return "-"
    return "infinite" if math.isinf(value) else format(value, form)


def _signed(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return ("ruled out" if value < 0 else "infinite") if math.isinf(value) else f"{value:+.3f}"
