"""The two plots of a task as SVG that follows the page's colours, in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from lmmhooks_eval.recipe import BASELINE

__all__ = ["COLOURS", "MARKERS", "STYLE", "cost_quality_plot", "difference_plot", "svg_text"]

# Everything neutral is drawn in a colour nothing else uses and turned into `currentColor` in the SVG text, so that axes
# and labels are dark on a light page and light on a dark one.
_INK = "#010203"
_TONES = {"": "#8a8f98", "good": "#2e9e5b", "bad": "#d0533f"}
# Mid tones, legible on either page; markers tell apart what colour does not.
COLOURS = ("#3f7fd0", "#d9822b", "#2e9e5b", "#a35bbf", "#d0533f", "#20a0a8", "#9a7b1e", "#d3609a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_MOST_NAMED = 36
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, scales with the page and shares no glyph ids
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def difference_plot(task: Mapping[str, Any], name: str) -> str | None:
    """
    Difference of the primary metric to the baseline with its interval, one line per variant.

    Parameters
    ----------
    task
        The task's part of ``metrics.json``.
    name
        Of the task; keeps the ids of several plots on a page apart.

    Returns
    -------
    str or None
        An ``<svg>`` element; None if there is no variant to show.
    """
    metric = task["primary"]
    shown = [
        (variant, figures["metrics"][metric])
        for variant, figures in task["variants"].items()
        if variant != BASELINE and metric in figures["metrics"]
    ]
    if not shown:
        return None
    scale, better = _scale(task), task["metrics"][metric]["better"]
    with rc_context({**STYLE, "svg.hashsalt": f"difference/{name}"}):
        figure = Figure(figsize=(6.4, 0.9 + 0.32 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=_INK, linewidth=0.8, alpha=0.6)
        for row, (_, estimate) in enumerate(reversed(shown)):
            low, high = (scale * bound for bound in estimate["difference_interval"])
            tone = (
                ""
                if low <= 0 <= high or better == "neither"
                else "good"
                if (low > 0) == (better == "higher")
                else "bad"
            )
            axes.plot([low, high], [row, row], color=_TONES[tone], linewidth=2.5, solid_capstyle="round")
            axes.plot([scale * estimate["difference"]], [row], "o", color=_TONES[tone], markersize=5)
        axes.set_yticks(range(len(shown)), [variant for variant, _ in reversed(shown)])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel(f"difference to the baseline: {_axis(task)}")
        return _svg(figure)


def cost_quality_plot(task: Mapping[str, Any], name: str) -> str | None:
    """
    Primary metric against measured prefill time, both relative to the same run's baseline.

    None without times, and for more variants than a legend can name: sweeps have a plot of their own.

    Parameters
    ----------
    task, name
        As in `difference_plot`.
    """
    metric, scale = task["primary"], _scale(task)
    points = []
    for variant, figures in task["variants"].items():
        estimate, cost = figures["metrics"].get(metric), figures["cost"]
        time = 1.0 if variant == BASELINE else cost.get("relative", {}).get("prefill_time")
        if estimate is not None and time is not None:
            points.append((variant, time, scale * estimate["value"], [scale * bound for bound in estimate["interval"]]))
    if not 2 <= len(points) <= _MOST_NAMED:
        return None
    with rc_context({**STYLE, "svg.hashsalt": f"cost/{name}"}):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for index, (variant, time, value, (low, high)) in enumerate(points):
            colour = _INK if variant == BASELINE else COLOURS[index % len(COLOURS)]
            axes.plot([time, time], [low, high], color=colour, linewidth=1.2, alpha=0.6)
            marker = MARKERS[index % len(MARKERS)]
            axes.plot([time], [value], marker, color=colour, markersize=6, label=variant)
        # Variants of one budget cost the same, so names beside the points would lie on top of each other.
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        axes.set_xlabel("prefill time, baseline = 1 (measured)")
        axes.set_ylabel(_axis(task))
        return _svg(figure)


def _scale(task: Mapping[str, Any]) -> float:
    return 100.0 if task["metrics"][task["primary"]]["unit"] == "share" else 1.0


def _axis(task: Mapping[str, Any]) -> str:
    about = task["metrics"][task["primary"]]
    unit = " %" if about["unit"] == "share" else ""
    direction = {"higher": " (higher is better)", "lower": " (lower is better)", "neither": ""}[about["better"]]
    return f"{task['primary']}{unit}{direction}"


def svg_text(figure: Figure, transparent: bool) -> str:
    """The SVG of a figure, the same for the same figure."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=transparent, metadata={"Date": None})
    return stream.getvalue()


def _svg(figure: Figure) -> str:
    text = svg_text(figure, transparent=True)
    # Inline SVG needs neither XML declaration nor doctype.
    return text[text.index("<svg") :].replace(_INK, "currentColor")
