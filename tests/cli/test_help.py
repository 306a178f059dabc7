"""The command line starts without torch or transformers."""

from __future__ import annotations

import subprocess
import sys
import time

CONTRACT = (
    "run",
    "compare",
    "inspect",
    "playground",
    "bench",
    "calibrate",
    "score",
    "report",
    "methods",
    "families",
    "tasks",
    "recipes",
    "doctor",
)

PROBE = """
import sys
from lmmhooks.cli.app import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "numpy", "pydantic", "matplotlib"} & set(sys.modules)
sys.stderr.write(",".join(sorted(heavy)))
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "bench" in done.stdout


def test_help_is_quick() -> None:
    def seconds() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lmmhooks.cli.app", "--help"], capture_output=True, check=True)
        return time.perf_counter() - begin

    # 0.2 s on an idle core; the best of a few keeps a busy machine from failing it.
    assert min(seconds() for _ in range(5)) < 0.5


def test_every_command_of_the_contract_is_offered() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lmmhooks.cli.app", "--help"], capture_output=True, text=True, check=True
    )
    for name in CONTRACT:
        assert f"\n  {name} " in done.stdout, name
