"""The plot of a sweep: the metric against what was kept, and against what reading the prompt cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmmhooks_eval.report.plots import COLOURS, MARKERS, STYLE, svg_text
from lmmhooks_eval.report.sweep import PIXELS, REFERENCE, by_method

__all__ = ["sweep_plot"]

_CONTROLS = (REFERENCE, "uniform-grid", "pool", PIXELS)
_NAMED = 5
_GREY = "#b4b8bf"


def sweep_plot(task: Mapping[str, Any], name: str, times: bool = False) -> str:
    """
    One task of a sweep as an SVG file on a white ground.

    The controls and the methods that lead random tokens by most, on average over budgets, are named; the others are
    drawn in grey.

    Parameters
    ----------
    task
        As `lmmhooks_eval.report.sweep.sweep_record` makes it.
    name
        Of the task.
    times
        Show measured prefill time on the right instead of theoretical FLOPs. The passes of a run are minutes apart, so
        their times compare only where the machine did nothing else.
    """
    methods = by_method(task)
    leaders = [method for method in methods if method not in _CONTROLS][:_NAMED]
    named = [*leaders, *(method for method in _CONTROLS if method in methods)]
    scale = 100.0 if task["metric"]["unit"] == "share" else 1.0
    with rc_context({**STYLE, "svg.hashsalt": f"sweep/{name}"}):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, of, label in (
            (left, "tokens", "visual tokens per decoder layer, share of all (measured)"),
            (right, "prefill_time", "prefill time, all tokens = 1 (measured)")
            if times
            else (right, "prefill_flops", "decoder FLOPs of the prompt, all tokens = 1 (theory)"),
        ):
            axes.axhline(scale * task["baseline"]["value"], color="black", linewidth=0.8, linestyle=":")
            for method, points in methods.items():
                if method not in named:
                    _line(axes, list(points.values()), of, scale, color=_GREY, linewidth=0.8, zorder=1)
            for index, method in enumerate(named):
                look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                width = {"linestyle": "--"} if method in _CONTROLS else {}
                _line(axes, list(methods[method].values()), of, scale, label=method, markersize=4, **look, **width)
            axes.set_xlabel(label)
        unit = " %" if task["metric"]["unit"] == "share" else ""
        left.set_ylabel(f"{task['metric']['name']}{unit}, {name}")
        right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        return svg_text(figure, transparent=False)


def _line(axes: Axes, points: list[Mapping[str, Any]], of: str, scale: float, **look: Any) -> None:
    found = sorted((p["cost"][of], scale * p["value"]) for p in points if p["cost"][of] is not None)
    if found:
        axes.plot([x for x, _ in found], [y for _, y in found], **look)
