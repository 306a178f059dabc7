"""
A paper's printed figures beside a run's own: what the paper says, what was measured, and whether the gain came back.

A recipe that reproduces a paper carries its figures in a ``paper`` block. They are for one checkpoint: with another
model in the recipe nothing is compared, since the difference would say nothing about either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lmmhooks.errors import closest
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.task import Metric, Task

__all__ = ["PaperFigures", "check_figures", "comparison"]

_BASELINE = "baseline"

_Results = dict[str, dict[str, dict[str, float]]]


class PaperFigures(BaseModel):
    """Figures of one table of one paper."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1, description="Title, arXiv id and table or section they are printed in.")
    model: str = Field(min_length=1, description="The checkpoint they are for, as `model` of a recipe names it.")
    unit: Literal["percent", "share"] = Field(
        description="How shares are printed: 85.9 or 0.859. Metrics that are no share (lengths) stand as they are."
    )
    notes: str = Field(default="", description="What the paper leaves open about its setting.")
    results: _Results = Field(min_length=1, description="Task -> metric -> variant (or baseline) -> figure as printed.")

    @field_validator("results")
    @classmethod
    def _nothing_is_empty(cls, results: _Results) -> _Results:
        for task, by_metric in results.items():
            for metric, figures in by_metric.items() or [("any metric", {})]:
                if not figures:
                    raise ValueError(f"no figures for {metric} of task {task!r}; give them by variant, or drop the key")
        return results

    def refuse_unknown(self, tasks: Iterable[str], variants: Iterable[str]) -> None:
        """Raise ValueError unless the recipe has every task and variant that is named here."""
        known_tasks, known_variants = sorted(tasks), [_BASELINE, *variants]
        for task, by_metric in self.results.items():
            if task not in known_tasks:
                raise ValueError(
                    f"figures for a task that this recipe does not run, {task!r}{closest(task, known_tasks)}; "
                    f"it runs {', '.join(known_tasks)}"
                )
            for variant in (name for figures in by_metric.values() for name in figures):
                if variant not in known_variants:
                    raise ValueError(
                        f"figures for a variant that this recipe does not have, {variant!r}"
                        f"{closest(variant, known_variants)}; it has {', '.join(known_variants)}"
                    )


def check_figures(papers: Sequence[PaperFigures], tasks: Mapping[str, Task]) -> None:
    """
    Raise `RecipeError` for a metric that its task does not have, or a figure that cannot be one of that metric.

    Parameters
    ----------
    papers
        The blocks of a recipe.
    tasks
        The tasks of the recipe by name.
    """
    for paper in papers:
        for name, by_metric in paper.results.items():
            metrics = {metric.name: metric for metric in tasks[name].metrics}
            for metric, figures in by_metric.items():
                if metric not in metrics:
                    raise RecipeError(
                        f"paper: task {name!r} has no metric {metric!r}{closest(metric, metrics)}; "
                        f"it has {', '.join(metrics)}"
                    )
                for variant, figure in figures.items():
                    if metrics[metric].unit == "share" and not 0 <= figure * _scale(paper, metrics[metric]) <= 1:
                        limits = "0 to 100" if paper.unit == "percent" else "0 to 1"
                        raise RecipeError(
                            f"paper: {name} {metric} of {variant} is {figure:g}, but a figure in unit {paper.unit} "
                            f"lies in {limits}; correct it or the unit"
                        )


def comparison(
    papers: Sequence[PaperFigures], model: str, task: Task, variants: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """
    The rows of one task: one for every printed figure.

    Parameters
    ----------
    papers
        The blocks of the recipe.
    model
        Model of the run; blocks about other checkpoints give no rows.
    task
        The task.
    variants
        Scored figures by variant, as in ``metrics.json``.

    Returns
    -------
    list of dict
        ``source``, ``metric``, ``variant``, ``paper``, ``ours``, ``interval``, ``difference`` (ours minus paper) and,
        for variants, ``paper_gain``, ``gain``, ``gain_interval`` and ``reproduced`` (whether the paper's gain lies in
        our interval). Shares are in [0, 1] whatever unit the paper prints; what one side lacks is None.
    """
    rows: list[dict[str, Any]] = []
    metrics = {metric.name: metric for metric in task.metrics}
    for paper in papers:
        if paper.model != model:
            continue
        for name, figures in paper.results.get(task.name, {}).items():
            scale = _scale(paper, metrics[name])
            for variant, figure in figures.items():
                estimate = variants.get(variant, {}).get("metrics", {}).get(name)
                row = {"source": paper.source, "metric": name, "variant": variant, "paper": figure * scale}
                row |= {"ours": None, "interval": None, "difference": None}
                if estimate is not None:
                    row |= {
                        "ours": estimate["value"],
                        "interval": estimate["interval"],
                        "difference": estimate["value"] - figure * scale,
                    }
                rows.append(row | _gains(variant, figures, scale, estimate))
    return rows


def _gains(
    variant: str, figures: Mapping[str, float], scale: float, estimate: Mapping[str, Any] | None
) -> dict[str, Any]:
    gains: dict[str, Any] = dict.fromkeys(("paper_gain", "gain", "gain_interval", "reproduced"))
    if variant == _BASELINE:
        return gains
    if _BASELINE in figures:
        gains["paper_gain"] = (figures[variant] - figures[_BASELINE]) * scale
    if estimate is not None:
        gains |= {"gain": estimate["difference"], "gain_interval": estimate["difference_interval"]}
    if gains["paper_gain"] is not None and gains["gain_interval"] is not None:
        low, high = gains["gain_interval"]
        gains["reproduced"] = low <= gains["paper_gain"] <= high
    return gains


def _scale(paper: PaperFigures, metric: Metric) -> float:
    return 0.01 if paper.unit == "percent" and metric.unit == "share" else 1.0
