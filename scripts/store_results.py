"""
Keep what a results page needs of a run: `python scripts/store_results.py RUN_DIR --out docs/results/NAME.json`.

Several folders are runs of one recipe under several seeds; `--decoding` holds methods against controls of their run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.report.decoding import decoding_record
from lmmhooks_eval.report.markdown import condensed
from lmmhooks_eval.report.refinement import refinement_record
from lmmhooks_eval.report.sweep import sweep_record
from lmmhooks_eval.report.sweep_plot import sweep_plot
from lmmhooks_eval.score import score_run
from lmmhooks_eval.store import ENVIRONMENT, read_config, write_atomically


def _take_times(record: dict[str, Any], run_dir: Path) -> None:
    """Put the relative prefill times of another run of the same sweep into a record."""
    environment = json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    timed = sweep_record(run_dir, environment)
    for name, task in record["tasks"].items():
        found = {(p["method"], p["budget"]): p["cost"]["prefill_time"] for p in timed["tasks"][name]["points"]}
        for point in task["points"]:
            point["cost"]["prefill_time"] = found.get((point["method"], point["budget"]))
    record["times"] = {"documents": {name: task["n"] for name, task in timed["tasks"].items()}, **environment}


def main() -> None:
    """Score the runs anew and write their record; a run with problems is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--times",
        type=Path,
        metavar="RUN_DIR",
        help="of a sweep: plot prefill times instead of FLOPs, measured by this run of the same recipe, which may be a "
        "short one on an idle machine",
    )
    parser.add_argument("--decoding", action="store_true", help="runs of decoding methods and their controls")
    parser.add_argument("--refinement", action="store_true", help="a run of methods that look again and their controls")
    given = parser.parse_args()
    first = given.run_dir[0]
    if len(given.run_dir) > 1 and not given.decoding:
        parser.error("several folders are read together with --decoding alone")
    environment = json.loads((first / ENVIRONMENT).read_text(encoding="utf-8"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.refinement:
        try:
            record = refinement_record(first, environment)
        except RecipeError as error:
            sys.exit(str(error))
    elif given.decoding:
        try:
            record = decoding_record(given.run_dir, environment)
        except RecipeError as error:
            sys.exit(str(error))
    elif read_config(first).get("sweep"):
        try:
            record = sweep_record(first, environment)
            if given.times is not None:
                _take_times(record, given.times)
        except RecipeError as error:
            sys.exit(str(error))
        for name, task in record["tasks"].items():
            plot = sweep_plot(task, name, given.times is not None)
            write_atomically(given.out.with_name(f"{given.out.stem}-{name}.svg"), plot)
    else:
        metrics = score_run(first)
        if metrics["problems"]:
            sys.exit(f"{first} must not be published: {'; '.join(metrics['problems'])}")
        record = condensed(metrics, environment)
    write_atomically(given.out, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
