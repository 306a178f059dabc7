"""
Measure what the harness costs and how long the quickstart takes: `python scripts/measure_harness.py --out FILE`.

Overhead: the runner against a bare `generate()` loop over the same batches. Quickstart: the command as a user types it,
from start to finished report, in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from lmmhooks.bench.record import check_writable, write_record
from lmmhooks.loading import load
from lmmhooks_eval.environment import describe
from lmmhooks_eval.overhead import measure_overhead


def quickstart_seconds() -> float:
    """Run the quickstart recipe in a new process and return the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lmmhooks.cli.app", "run", "quickstart", "--out", str(Path(folder) / "run")]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin


def main() -> None:
    """Measure and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    check_writable(given.out)
    busy = os.getloadavg()[0]
    model, processor = load(given.model, dtype="float32")
    overhead = measure_overhead(model, processor, repeats=given.repeats)
    record = {
        "kind": "harness",
        "environment": describe(model, {"name": given.model, "dtype": "float32"}, {}),
        "load_average": busy,
        "overhead": asdict(overhead),
        "quickstart_seconds": quickstart_seconds(),
    }
    write_record(record, given.out)
    print(f"overhead {overhead.overhead:+.1%}, quickstart {record['quickstart_seconds']:.0f} s; written to {given.out}")


if __name__ == "__main__":
    main()
