"""
Measure how well maps find what is asked about: `python scripts/measure_maps.py --model tiny-llava --out FILE.json`.

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
from lmmhooks_eval.environment import describe
from lmmhooks_eval.identity import ModelIdentity
from lmmhooks_eval.localisation import KINDS, measure, summary
from lmmhooks_eval.plan import select
from lmmhooks_eval.report.contact_sheet import contact_sheet, shown_documents
from lmmhooks_eval.tasks import get_task

TASKS = ("scenes-small", "scenes-pope")
METHODS = {name: name for name in ("carve", "vicrop-rel", "vicrop-grad", "vicrop-pure-grad", "api", "attwarp")}


def main() -> None:
    """Measure and write one result file and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--limit", type=int, default=120, help="about this many documents of each task")
    parser.add_argument("--task", action="append", help=f"repeatable; unset: {', '.join(TASKS)}")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; unset: all")
    parser.add_argument(
        "--method", action="append", metavar="NAME=SPEC", help="repeatable, e.g. carve='carve(read_layers=(4, 5))'"
    )
    parser.add_argument("--calibration", action="store_true", help="on documents that are no part of the benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    check_writable(given.out)
    methods = METHODS if given.method is None else dict(pair.partition("=")[::2] for pair in given.method)
    kinds = tuple(given.kind or KINDS)
    model, processor = load(given.model, dtype="float32")
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
    record = {
        "kind": "localisation",
        "model": given.model,
        "environment": describe(model, asdict(ModelIdentity.of(given.model, model, processor)), sources),
        "methods": methods,
        "limit": given.limit,
        "calibration": given.calibration,
        "tasks": tasks,
    }
    write_record(record, given.out)
    sys.stderr.write(f"\nwrote {given.out}\n")


if __name__ == "__main__":
    main()
