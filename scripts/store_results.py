"""Keep what a results page needs of a run: `python scripts/store_results.py RUN_DIR --out docs/results/NAME.json`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.report.markdown import condensed
from lmmhooks_eval.report.refinement import refinement_record
from lmmhooks_eval.report.sweep import sweep_record
from lmmhooks_eval.report.sweep_plot import sweep_plot
from lmmhooks_eval.score import score_run
from lmmhooks_eval.store import ENVIRONMENT, read_config, write_atomically


def main() -> None:
    """Score the run anew and write its record; a run with problems is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--times", action="store_true", help="plot measured time instead of FLOPs (only for runs on an idle machine)"
    )
    parser.add_argument("--refinement", action="store_true", help="a run of methods that look again and their controls")
    given = parser.parse_args()
    environment = json.loads((given.run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.refinement:
        try:
            record = refinement_record(given.run_dir, environment)
        except RecipeError as error:
            sys.exit(str(error))
    elif read_config(given.run_dir).get("sweep"):
        try:
            record = sweep_record(given.run_dir, environment)
        except RecipeError as error:
            sys.exit(str(error))
        for name, task in record["tasks"].items():
            write_atomically(given.out.with_name(f"{given.out.stem}-{name}.svg"), sweep_plot(task, name, given.times))
    else:
        metrics = score_run(given.run_dir)
        if metrics["problems"]:
            sys.exit(f"{given.run_dir} must not be published: {'; '.join(metrics['problems'])}")
        record = condensed(metrics, environment)
    write_atomically(given.out, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
