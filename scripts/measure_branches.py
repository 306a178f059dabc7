"""
Measure what lazy branches save on captions of the bundled models: `python scripts/measure_branches.py --out FILE`.

Random weights are never sure of a token, so that `lmmhooks bench` on a named shape cannot say it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from lmmhooks.bench.record import check_writable, write_record
from lmmhooks.loading import load
from lmmhooks.methods import resolve
from lmmhooks_eval.branching import measure_branches
from lmmhooks_eval.environment import describe

MODELS = ("tiny-llava", "tiny-qwen")
METHODS = ("vcd", "icd", "m3id", "vdd", "ritual", "avisc", "sid")


def main() -> None:
    """Measure every model and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", action="append", help=f"repeatable; unset: {' and '.join(MODELS)}")
    parser.add_argument("--method", action="append", help=f"repeatable; unset: {', '.join(METHODS)}")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    check_writable(given.out)
    busy = os.getloadavg()[0]
    rows = []
    for name in given.model or MODELS:
        model, processor = load(name, dtype="float32")
        methods = [resolve(spec) for spec in given.method or METHODS]
        costs = measure_branches(model, processor, methods, documents=given.documents, repeat=given.repeat)
        rows += [{"model": name, **asdict(cost)} for cost in costs]
    record = {
        "kind": "branches",
        "environment": describe(model, {"name": ", ".join(given.model or MODELS), "dtype": "float32"}, {}),
        "attention": model.config.get_text_config()._attn_implementation,
        "load_average": busy,
        "documents": given.documents,
        "repeat": given.repeat,
        "rows": rows,
    }
    write_record(record, given.out)
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
