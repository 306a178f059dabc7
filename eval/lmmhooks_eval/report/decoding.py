"""
Decoding methods beside controls that know nothing about the image, as a results page.

A method is held against the untouched model and against the best of the controls of its run: leaning towards Yes, a
cut of implausible tokens, another temperature, its own contrast turned around or made with an unrelated picture. Runs
of the same recipe with several seeds are read as one: every seed's answer to a document counts, answers about one image
stay together, and figures of each seed stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmmhooks_eval import stats
from lmmhooks_eval.answers import Scored, scored_answers
from lmmhooks_eval.bias import AUC, TUNED_OFFSET, offset_answers
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.recipe import BASELINE, Recipe, TaskPlan
from lmmhooks_eval.recipes import build
from lmmhooks_eval.report.markdown import BESIDE, setting_line
from lmmhooks_eval.report.tables import STEP_COLUMNS, Cell, headline, metric_cell, step_cells
from lmmhooks_eval.score import compare, score_run
from lmmhooks_eval.steps import USUAL_CUT, one_token_share, step_figures
from lmmhooks_eval.store import differences, read_config, read_samples
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import open_task

__all__ = ["CONTROLS", "decoding_page", "decoding_record"]

CONTROLS = frozenset(
    {"apc-only", "temperature", "equal-branch", "sign-flip", "placebo-image", "olm", "pba", "yes-offset"}
)
"""Methods that are controls of others; a variant made of one of them alone is a control."""

_LEVEL = 0.05
_Answers = dict[str, dict[str, Scored]]


def decoding_record(paths: Sequence[Path], environment: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a results page needs of runs of decoding methods.

    Parameters
    ----------
    paths
        Run folders of one recipe that differ in their seed.
    environment
        ``env.json`` of the first.

    Returns
    -------
    dict
        ``model``, ``mode``, ``seeds`` and ``tasks``; a task is what ``metrics.json`` holds of it, over all seeds, with
        for every variant ``by_seed`` (its first metric), ``control`` (whether it is one) and for the others
        ``against``: ``difference``, ``interval``, ``p`` and ``p_holm`` beside ``best_control`` of the task.

    Raises
    ------
    RecipeError
        The runs are of different recipes or one seed, or have problems that forbid publishing them.
    """
    configs = [read_config(path) for path in paths]
    seeds = [int(config["seed"]) for config in configs]
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"runs to be read together need a seed each, got {', '.join(map(str, seeds))}")
    for path, config in zip(paths[1:], configs[1:], strict=True):
        if differing := [line for line in differences(configs[0], config) if not line.startswith("seed:")]:
            raise RecipeError(f"{path} is a run of another recipe than {paths[0]} ({'; '.join(differing[:3])})")
    scored = [score_run(path) for path in paths]
    for path, metrics in zip(paths, scored, strict=True):
        if metrics["problems"]:
            raise RecipeError(f"{path} must not be published: {'; '.join(metrics['problems'])}")
    recipe = build(configs[0], str(paths[0]))
    samples = [read_samples(path) for path in paths]
    tasks = {}
    for plan in recipe.tasks:
        task = open_task(plan)
        pooled: _Answers = {}
        for seed, records in zip(seeds, samples, strict=True):
            for variant, answers in scored_answers(records, plan, task).items():
                named = {f"{seed}/{doc}": answer for doc, answer in answers.items()}
                pooled.setdefault(variant, {}).update(named)
        tasks[plan.name] = _task(recipe, plan, task, pooled, [metrics["tasks"][plan.name] for metrics in scored])
    return {
        "kind": "decoding",
        "recipe": recipe.name,
        "model": recipe.model,
        "mode": _mode(task_generation(recipe)),
        "seeds": seeds,
        "statistics": scored[0]["statistics"],
        "tasks": tasks,
        "environment": dict(environment),
    }


def task_generation(recipe: Recipe) -> dict[str, Any]:
    """How the first task of a recipe is generated, as far as the recipe says."""
    return recipe.tasks[0].generation.given()


def _mode(generation: Mapping[str, Any]) -> str:
    if generation.get("num_beams", 1) > 1:
        return f"{generation['num_beams']} beams"
    if generation.get("do_sample"):
        return f"sampled at temperature {generation.get('temperature', 1.0):g}"
    return "greedy"


def _is_control(recipe: Recipe, variant: str) -> bool:
    specs = recipe.variants[variant]
    named = [spec if isinstance(spec, str) else next(iter(spec)) for spec in specs]
    return len(named) == 1 and named[0].partition("(")[0] in CONTROLS


def _task(
    recipe: Recipe, plan: TaskPlan, task: Task, pooled: _Answers, scored: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    metric, settings = task.primary, recipe.statistics
    baseline, several = pooled[BASELINE], len(scored) > 1
    reference = [answer.record for answer in baseline.values()]
    lean = dict(scored[0])
    variants: dict[str, Any] = {}
    for variant, answers in pooled.items():
        figures = _slim(compare(task, baseline, answers, settings), metric.name, several)
        figures |= {
            "failed": sum(one["variants"][variant]["failed"] for one in scored),
            "unparsed": sum(one["variants"][variant]["unparsed"] for one in scored),
            "steps": step_figures(reference, [answer.record for answer in answers.values()]),
            "by_seed": [one["variants"][variant]["metrics"][metric.name]["value"] for one in scored],
            "control": variant != BASELINE and _is_control(recipe, variant),
        }
        variants[variant] = figures
    controls: dict[str, Any] = {}
    candidates = {name: pooled[name] for name, figures in variants.items() if figures["control"]}
    tuned = offset_answers(task, baseline, settings.seed, plan.parser)
    if tuned is not None:
        candidates[TUNED_OFFSET], offsets = tuned
        figures = _slim(compare(task, baseline, candidates[TUNED_OFFSET], settings), metric.name, several)
        figures["metrics"] = {name: value for name, value in figures["metrics"].items() if not _is_area(name)}
        extra = {"failed": 0, "unparsed": 0, "by_seed": [], "control": True, "divergence": None, "steps": None}
        controls[TUNED_OFFSET] = {**figures, **extra, "offsets": offsets}
    _correct([figures["test"] for name, figures in {**variants, **controls}.items() if name != BASELINE])
    best = _best({**variants, **controls}, metric.name, metric.better)
    if best is not None:
        against = []
        for variant, figures in variants.items():
            if variant != BASELINE and not figures["control"]:
                compared = _slim(compare(task, candidates[best], pooled[variant], settings), metric.name, several)
                estimate = compared["metrics"][metric.name]
                figures["against"] = {
                    "difference": estimate["difference"],
                    "interval": estimate["difference_interval"],
                    "p": compared["test"]["p"],
                }
                against.append(figures["against"])
        _correct(against)
    kept = ("title", "licence", "parser", "prompt", "primary", "metrics")
    return {
        **{key: lean[key] for key in kept},
        "n": variants[BASELINE]["n"],
        "images": variants[BASELINE]["clusters"],
        "one_token": one_token_share(reference, USUAL_CUT),
        "best_control": best,
        "variants": variants,
        "controls": controls,
    }


def _is_area(name: str) -> bool:
    return name.rpartition("/")[2] == AUC


def _slim(figures: dict[str, Any], metric: str, several: bool) -> dict[str, Any]:
    """Without lists of documents; over several seeds with a test that knows that they answer the same documents."""
    flips = {key: value for key, value in figures.get("flips", {}).items() if not key.endswith("_ids")}
    figures = {**figures, **({"flips": flips} if flips else {})}
    if several:
        estimate = figures["metrics"][metric]
        test = {"name": "cluster-bootstrap", "of": metric, "difference": estimate["difference"], "p": estimate["p"]}
        figures["test"] = test
    return figures


def _correct(tests: Sequence[dict[str, Any]]) -> None:
    for test, p in zip(tests, stats.holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p


def _best(variants: Mapping[str, Any], metric: str, better: str) -> str | None:
    """The control with the best first metric: what a method has to beat."""
    found = {name: figures["metrics"][metric]["value"] for name, figures in variants.items() if figures["control"]}
    if not found:
        return None
    choose = min if better == "lower" else max
    return choose(found, key=lambda name: found[name])


# -- the page ----------------------------------------------------------------------------------------------------------


def decoding_page(record: Mapping[str, Any], link: str) -> str:
    """
    The section of one record in Markdown.

    Parameters
    ----------
    record
        As `decoding_record` makes it.
    link
        Where the record lies, relative to the page.
    """
    seeds = record["seeds"]
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    setting = setting_line(record["environment"])
    parts = [f"## {record['model']}, {record['mode']}\n\n{setting} {told.capitalize()}. [{link}]({link})\n"]
    for name, task in record["tasks"].items():
        each = f" under each of {len(seeds)} seeds" if len(seeds) > 1 else ""
        number = task["n"] // len(seeds)
        parts.append(f"### {name}\n\n{task['title']}; {number} documents about {task['images']} images{each}.\n")
        parts += [_table(name, task, seeds), _steps(task), _reading(task, seeds)]
    return "\n".join(parts)


def _everything(task: Mapping[str, Any]) -> dict[str, Any]:
    return {**task["variants"], **task["controls"]}


def _table(name: str, task: Mapping[str, Any], seeds: Sequence[int]) -> str:
    shown = headline(name, task)
    beside = [metric for metric in BESIDE if metric in task["metrics"] and metric != task["primary"]]
    by_seed = ["by seed"] if len(seeds) > 1 else []
    # Failures stop a run from being published.
    header = [*shown.columns[:-1], *by_seed, *beside]
    rows = []
    for row in shown.rows:
        variant = row[0].text
        figures = _everything(task)[variant]
        name_of = f"*`{variant}`*" if figures["control"] else f"`{variant}`"
        cells = [Cell(name_of), *row[1:-1]]
        if by_seed:
            cells.append(Cell(_listed(figures["by_seed"], task)))
        cells += [metric_cell(task, variant, metric) for metric in beside]
        rows.append([f"**{cell.text}**" if cell.tone else cell.text for cell in cells])
    return _markdown(header, rows)


def _listed(values: Sequence[float], task: Mapping[str, Any]) -> str:
    return ", ".join(_number(value, task) for value in values) or "-"


def _number(value: float, task: Mapping[str, Any], sign: str = "") -> str:
    scale = 100 if task["metrics"][task["primary"]]["unit"] == "share" else 1
    return f"{scale * value:{sign}.1f}"


def _steps(task: Mapping[str, Any]) -> str:
    rows = [
        [f"`{variant}`", *(cell.text for cell in step_cells(figures["divergence"], figures["steps"]))]
        for variant, figures in task["variants"].items()
        if variant != BASELINE
    ]
    return _markdown(["where answers change", *STEP_COLUMNS], rows)


def _reading(task: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """What the tables say, in sentences that are true of any numbers."""
    metric, variants = task["primary"], task["variants"]
    sign = -1 if task["metrics"][metric]["better"] == "lower" else 1
    said = []
    base = variants[BASELINE]
    if len(seeds) > 1:
        low, high = (_number(end(base["by_seed"]), task) for end in (min, max))
        said.append(f"The baseline's {metric} lies between {low} and {high} over the seeds.")
    methods = {name: figures for name, figures in variants.items() if name != BASELINE and not figures["control"]}
    controls = {name: figures for name, figures in _everything(task).items() if figures["control"]}
    for what, group in (("methods", methods), ("controls", controls)):
        if group:
            better, worse = _sides({name: (f["test"]["difference"], f["test"]) for name, f in group.items()}, sign)
            said.append(f"Of {len(group)} {what}, surely better than the baseline: {better}; surely worse: {worse}.")
    best = task["best_control"]
    if best is not None and methods:
        value = _number(_everything(task)[best]["metrics"][metric]["value"], task)
        held = {name: (figures["against"]["difference"], figures["against"]) for name, figures in methods.items()}
        better, worse = _sides(held, sign)
        told = [name for name, (_, test) in held.items() if test["p_holm"] >= _LEVEL]
        said.append(
            f"The best control is `{best}` ({metric} {value}). Surely better than it: {better}; surely worse: {worse}; "
            f"not to be told from it: {_named(told)}."
        )
    said += _ranking(methods)
    unchanged = [name for name, figures in variants.items() if name != BASELINE and figures["changed_texts"] == 0]
    if unchanged:
        said.append(f"Not one answer was changed by {_named(unchanged)}.")
    late = [name for name, figures in methods.items() if figures["divergence"] and figures["divergence"]["later"] > 0]
    known = [name for name, figures in methods.items() if figures["divergence"]]
    if known:
        said.append(f"Some answers begin with the baseline's token and differ later under {_named(late)}.")
    if task["one_token"] is not None:
        said.append(
            f"At {100 * task['one_token']:.1f} % of the baseline's steps one token alone passes a cut of "
            f"{USUAL_CUT:g}: no method with that cut can act there."
        )
    return "".join(f"- {line}\n" for line in said)


def _ranking(methods: Mapping[str, Any]) -> list[str]:
    found = {name: figures["metrics"][AUC] for name, figures in methods.items() if AUC in figures["metrics"]}
    if not found:
        return []
    above = [name for name, estimate in found.items() if estimate["difference_interval"][0] > 0]
    below = [name for name, estimate in found.items() if estimate["difference_interval"][1] < 0]
    return [
        f"They tell yes from no (AUC, uncorrected interval) better than the baseline: {_named(above)}; worse: "
        f"{_named(below)}."
    ]


def _sides(differences: Mapping[str, tuple[float, Mapping[str, Any]]], sign: int) -> tuple[str, str]:
    """Names of what is surely better and surely worse."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name, (difference, test) in differences.items():
        if test["p_holm"] < _LEVEL:
            sides[sign * difference > 0].append(name)
    return _named(sides[True]), _named(sides[False])


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
