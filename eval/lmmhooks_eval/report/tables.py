"""Tables of a scored run as plain data; the console and the HTML page draw the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmmhooks_eval.recipe import BASELINE
from lmmhooks_eval.steps import USUAL_CUT

__all__ = [
    "STEP_COLUMNS",
    "Cell",
    "Table",
    "cost_table",
    "headline",
    "metric_cell",
    "metrics_table",
    "notes",
    "paper_table",
    "step_cells",
    "steps_table",
]

Tone = Literal["", "good", "bad"]
NOTHING = "-"

# A percentile bootstrap over fewer clusters than this undercovers noticeably; the reader is told.
_FEW_CLUSTERS = 30


@dataclass(frozen=True)
class Cell:
    """
    One cell.

    Parameters
    ----------
    text
        What it says.
    tone
        Whether it is an improvement or a loss. Set only for a difference whose interval excludes 0: a difference that
        may be none is neither coloured nor bold.
    """

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table with its heading; the first column names the row, all others are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def headline(name: str, task: Mapping[str, Any]) -> Table:
    """The primary metric of every variant: value, difference to the baseline, test, flips, answers that are missing."""
    metric = task["primary"]
    rows = []
    # Controls that need no run of their own (the tuned offset) stand below those that were run.
    for variant, figures in {**task["variants"], **task.get("controls", {})}.items():
        estimate = figures["metrics"].get(metric)
        test, flips = figures.get("test"), figures.get("flips")
        compared = variant != BASELINE and estimate is not None
        rows.append(
            [
                Cell(variant),
                _value(estimate, task, metric),
                _difference(estimate, task, metric) if compared else Cell(NOTHING),
                Cell(_p(test["p_holm"]) if compared and test else NOTHING),
                Cell(str(flips["fixed"]) if compared and flips else NOTHING),
                Cell(str(flips["broken"]) if compared and flips else NOTHING),
                Cell(str(figures.get("changed_texts", NOTHING)) if compared else NOTHING),
                Cell(str(figures["n"])),
                Cell(str(figures["unparsed"])),
                Cell(str(figures["failed"])),
            ]
        )
    columns = ["variant", _label(task, metric), "difference", "p (Holm)", "fixed", "broken", "changed", "n"]
    return Table(f"{name}: {task['title']}", [*columns, "unparsed", "failed"], rows)


def metric_cell(task: Mapping[str, Any], variant: str, metric: str) -> Cell:
    """One metric of one variant: with its interval for the baseline, else with its difference to the baseline."""
    figures = task["variants"].get(variant) or task["controls"][variant]
    estimate = figures["metrics"].get(metric)
    if variant == BASELINE or estimate is None:
        return _value(estimate, task, metric)
    difference = _difference(estimate, task, metric)
    return Cell(f"{_number(estimate['value'], task, metric)} ({difference.text})", difference.tone)


def metrics_table(name: str, task: Mapping[str, Any]) -> Table:
    """Every metric of every variant, with the difference to the baseline."""
    rows = []
    for metric in task["metrics"]:
        cells = [metric_cell(task, variant, metric) for variant in task["variants"]]
        if any(cell.text != NOTHING for cell in cells):
            rows.append([Cell(_label(task, metric)), *cells])
    return Table(f"{name}: all metrics", ["metric", *task["variants"]], rows)


def paper_table(name: str, task: Mapping[str, Any]) -> Table | None:
    """What papers print beside what was measured here; None if the recipe gives no figures for this task and model."""
    if not task.get("paper"):
        return None
    rows = []
    for row in task["paper"]:
        metric, reproduced = row["metric"], row["reproduced"]
        shown = {
            key: Cell(NOTHING if row[key] is None else _number(row[key], task, metric, sign))
            for key, sign in (("paper", ""), ("difference", "+"), ("paper_gain", "+"))
        }
        ours = None if row["ours"] is None else {"value": row["ours"], "interval": row["interval"]}
        gain = None if row["gain"] is None else {"difference": row["gain"], "difference_interval": row["gain_interval"]}
        rows.append(
            [
                Cell(f"{row['variant']}, {_label(task, metric)}"),
                shown["paper"],
                _value(ours, task, metric),
                shown["difference"],
                shown["paper_gain"],
                Cell(NOTHING) if gain is None else _difference(gain, task, metric),
                Cell(NOTHING if reproduced is None else "yes" if reproduced else "no"),
                Cell(row["source"]),
            ]
        )
    columns = ["figure", "paper", "ours", "ours - paper", "paper's gain", "our gain", "paper's gain in our interval"]
    return Table(f"{name}: the paper's figures", [*columns, "printed in"], rows)


def steps_table(name: str, task: Mapping[str, Any]) -> Table | None:
    """Where answers part from the baseline's, and on how many steps a method could act; None if nothing is known."""
    rows = []
    for variant, figures in task["variants"].items():
        parts, steps = figures.get("divergence"), figures.get("steps")
        if variant != BASELINE and parts and steps:
            rows.append([Cell(variant), *step_cells(parts, steps)])
    columns = ["variant", *STEP_COLUMNS]
    return Table(f"{name}: where answers change", columns, rows) if rows else None


STEP_COLUMNS = ("first token %", "later only %", "tokens %", "cut", "one plausible token %", "branches ran %")
"""
Documents whose first token differs, documents that differ behind an equal first token, positions with another token;
the method's plausibility cut (in brackets the usual one where it has none), steps of the baseline at which it leaves
one token, steps on which branches ran.
"""


def step_cells(parts: Mapping[str, Any] | None, steps: Mapping[str, Any] | None) -> list[Cell]:
    """The cells of `STEP_COLUMNS` for one variant."""
    parts, steps = parts or {}, steps or {}
    shares = [parts.get(key) for key in ("first", "later", "tokens")]
    cut = steps.get("cut")
    return [
        *(Cell(NOTHING if share is None else f"{100 * share:.1f}") for share in shares),
        Cell(f"({USUAL_CUT:g})" if cut is None else f"{cut:g}"),
        *(
            Cell(NOTHING if steps.get(key) is None else f"{100 * steps[key]:.1f}")
            for key in ("one_token", "branch_steps")
        ),
    ]


def cost_table(name: str, task: Mapping[str, Any]) -> Table:
    """Tokens, times, memory and the ratios to the baseline, theoretical beside measured: 1 / ratio is the speed-up."""
    rows = []
    for variant, figures in task["variants"].items():
        cost = figures["cost"]
        if not cost:
            continue
        relative = cost["relative"] if variant != BASELINE else {}
        rows.append(
            [
                Cell(variant),
                Cell(f"{cost['visual_in']:.0f}"),
                Cell(_plain(cost["visual_kept"], ".1f")),
                Cell(f"{cost['prefill_ms']['median']:.1f}"),
                Cell(_plain(relative.get("prefill_time"), ".2f")),
                Cell(_plain(relative.get("prefill_limit"), ".2f")),
                Cell(_plain(relative.get("prefill_flops"), ".2f")),
                Cell(_plain(cost["decode_tokens_per_s"], ".1f")),
                Cell(_plain(relative.get("step_time"), ".2f")),
                Cell(_plain(cost["kv_mib"], ".3f")),
                Cell(_plain(relative.get("kv_bytes"), ".2f")),
                Cell(f"{cost['preprocess_ms']['median']:.1f}"),
                Cell(f"{cost['batch_size']:.0f}"),
            ]
        )
    columns = ["variant", "visual in", "kept per layer", "prefill ms", "prefill time x"]
    columns += [
        "native limit x",
        "decoder FLOPs x",
        "decode tokens/s",
        "step time x",
        "KV MiB",
        "KV x",
        "preprocess ms",
        "batch",
    ]
    return Table(
        f"{name}: cost (median times per batch, counts per document, x = ratio to the baseline; native limit = tower "
        "and decoder FLOPs of a prompt as short from the start)",
        columns,
        rows,
    )


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """How to read the tables: what the intervals are, the family of tests, and what the sample size can show."""
    statistics = metrics["statistics"]
    lines = [
        "No method is claimed to help unless its interval excludes 0.",
        "Intervals and colours judge one comparison at a time; p is corrected for all of them.",
        f"Intervals cover {100 * statistics['confidence']:g} %: paired bootstrap over images, {statistics['draws']} "
        "draws of the reported metric itself; Wilson's for plain proportions of independent documents.",
        f"p: exact McNemar test (paired t-test for fractional scores), Holm-corrected over the "
        f"{statistics['family_size']} comparisons of this run.",
    ]
    for paper in metrics.get("papers", []):
        if paper["model"] != metrics["model"]:
            lines.append(f"Figures of {paper['source']} are for {paper['model']} and are not compared with this model.")
        elif paper["notes"]:
            lines.append(f"{paper['source']}: {paper['notes']}")
    for name, task in metrics["tasks"].items():
        clusters = min((figures.get("clusters", 0) for figures in task["variants"].values()), default=0)
        if 0 < clusters < _FEW_CLUSTERS:
            lines.append(f"{name}: only {clusters} independent images; intervals from so few are too narrow.")
        shown = [
            figures["detectable_change"] for figures in task["variants"].values() if figures.get("detectable_change")
        ]
        if shown:
            lines.append(
                f"{name}: with these numbers of documents and of changed outcomes, a net change below "
                f"{100 * min(shown):.1f} to {100 * max(shown):.1f} points cannot be shown (80 % power)."
            )
    return lines


def _label(task: Mapping[str, Any], metric: str) -> str:
    unit = " %" if task["metrics"][metric]["unit"] == "share" else ""
    arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}[task["metrics"][metric]["better"]]
    return f"{metric}{unit}{arrow}"


def _number(value: float, task: Mapping[str, Any], metric: str, sign: str = "") -> str:
    scale = 100 if task["metrics"][metric]["unit"] == "share" else 1
    return f"{scale * value:{sign}.1f}"


def _value(estimate: Mapping[str, Any] | None, task: Mapping[str, Any], metric: str) -> Cell:
    if estimate is None:
        return Cell(NOTHING)
    low, high = (_number(bound, task, metric) for bound in estimate["interval"])
    return Cell(f"{_number(estimate['value'], task, metric)} [{low}, {high}]")


def _difference(estimate: Mapping[str, Any], task: Mapping[str, Any], metric: str) -> Cell:
    low, high = estimate["difference_interval"]
    shown = [_number(value, task, metric, "+") for value in (estimate["difference"], low, high)]
    better = task["metrics"][metric]["better"]
    tone: Tone = ""
    if better != "neither" and (low > 0 or high < 0):
        tone = "good" if (low > 0) == (better == "higher") else "bad"
    return Cell(f"{shown[0]} [{shown[1]}, {shown[2]}]", tone)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plain(value: float | None, form: str) -> str:
    return NOTHING if value is None else f"{value:{form}}"
