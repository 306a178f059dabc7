"""
Measure how well maps find what is asked about: `python scripts/measure_maps.py --recipe refinement --out FILE.json`.

Every kind of attention map and the map of every refinement method of the common shape, against the exact boxes of
scenes-small and scenes-pope. Writes the record, and beside it a sheet of pictures under the same name.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from lmmhooks.bench.record import check_writable, write_record
from lmmhooks.loading import load
from lmmhooks.methods.refinement.base import LookAgain
from lmmhooks.methods.refinement.nested import MapOfAnother
from lmmhooks_eval.environment import describe
from lmmhooks_eval.identity import ModelIdentity
from lmmhooks_eval.localisation import KINDS, measure, summary
from lmmhooks_eval.plan import select
from lmmhooks_eval.recipe import Recipe
from lmmhooks_eval.recipes import load as load_recipe
from lmmhooks_eval.report.contact_sheet import contact_sheet, shown_documents
from lmmhooks_eval.tasks import get_task

TASKS = ("scenes-small", "scenes-pope")


def methods_of(recipe: Recipe) -> dict[str, str]:
    """Variants of a recipe that are one method with a map of its own."""
    alone = {name: built[0] for name, built in recipe.methods().items() if len(built) == 1}
    return {
        name: method.spec()
        for name, method in alone.items()
        if isinstance(method, LookAgain) and not isinstance(method, MapOfAnother)
    }


def main() -> None:
    """Measure and write one result file and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="its model, and the maps of its methods beside the kinds of maps")
    what.add_argument("--model", help="kinds of maps alone")
    parser.add_argument("--limit", type=int, default=120, help="about this many documents of each task")
    parser.add_argument("--task", action="append", help=f"repeatable; unset: {', '.join(TASKS)}")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; unset: all")
    parser.add_argument("--calibration", action="store_true", help="on documents that are no part of the benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    check_writable(given.out)
    recipe = None if given.recipe is None else load_recipe(given.recipe)
    name_of_model = given.model if recipe is None else recipe.model
    methods = {} if recipe is None else methods_of(recipe)
    kinds = tuple(given.kind or KINDS)
    model, processor = load(name_of_model, dtype="float32")
    tasks, sources = {}, {}
    for name in given.task or TASKS:
        task = get_task(name)
        docs = task.calibration() if given.calibration and task.calibration is not None else task.load()
        chosen = select(task, docs, given.limit, given.seed)

        def told(done: int, name: str = name, of: int = len(chosen)) -> None:
            sys.stderr.write(f"\r{name}: {done} of {of}")

        rows = measure(model, processor, task, chosen, methods, kinds, told)
        tasks[name] = {"title": task.title, **summary(rows, seed=given.seed)}
        sources[name] = asdict(task.source())
        if shown_documents(task, docs):
            sheet = given.out.with_name(f"{given.out.stem}-{name}.png")
            contact_sheet(model, processor, task, docs, tasks[name], methods, sheet)
    identity = ModelIdentity.of(name_of_model, model, processor, settings={}, system=None, quantization=None)
    record = {
        "kind": "localisation",
        "model": name_of_model,
        "environment": describe(model, asdict(identity), sources),
        "methods": methods,
        "limit": given.limit,
        "calibration": given.calibration,
        "tasks": tasks,
    }
    write_record(record, given.out)
    sys.stderr.write(f"\nwrote {given.out}\n")


if __name__ == "__main__":
    main()
