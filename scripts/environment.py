"""Create or complete the virtual environment of a checkout: `python3 scripts/environment.py .venv`.

Needs nothing but the standard library, because it runs before anything is installed.

A torch that is already there and in the range of `pyproject.toml` is never replaced: one in the environment itself is
pinned to its exact version, and one that only the calling interpreter has is made visible inside the environment
(a path file that adds the caller's site directories *behind* the environment's own) and pinned too. Only where there
is none does pip choose, held to `constraints.txt`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REUSE_FILE = "_reused_site_directories.pth"

PROBE = """
import importlib.metadata, json, sys
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = None
names = ("site-packages", "dist-packages")
print(json.dumps({"torch": torch, "site": [p for p in sys.path if p.rstrip("/").endswith(names)]}))
"""


def probe(python: Path) -> dict:
    """Return the torch version and the site directories that an interpreter sees."""
    answer = subprocess.run([str(python), "-c", PROBE], check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def lower_bound(package: str) -> str:
    """Return the oldest version of a dependency that `pyproject.toml` allows, such as `2.6`."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'"{re.escape(package)}>=([0-9.]+)', text)
    if found is None:
        raise SystemExit(f"pyproject.toml states no lower bound for {package!r}: write '{package}>=VERSION' there")
    return found.group(1)


def in_range(version: str | None, minimum: str) -> bool:
    """Whether an installed version (`2.13.0+cpu`) is at least `minimum` (`2.6`)."""
    if version is None:
        return False

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])

    return numbers(version) >= numbers(minimum)


def create(venv: Path, python: Path) -> Path:
    """Create the environment if it is missing and return its interpreter."""
    interpreter = venv / "bin" / "python"
    if not interpreter.exists():
        done = subprocess.run([str(python), "-m", "venv", str(venv)], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stdout + done.stderr).strip().splitlines()
            raise SystemExit(
                f"could not create {venv}: {reason[0] if reason else 'venv failed'} "
                "(on Debian and Ubuntu the package python3-venv is needed)"
            )
    return interpreter


def reuse(interpreter: Path, donor: Path) -> None:
    """Make the donor's packages visible in the environment, behind the environment's own."""
    own = Path(probe(interpreter)["site"][0])
    lines = [f"import site; site.addsitedir({directory!r})" for directory in probe(donor)["site"]]
    (own / REUSE_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Bring one environment up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path, help="folder of the virtual environment")
    parser.add_argument("--extras", default="dev", help="extras to install, comma separated (default: dev)")
    parser.add_argument("--donor", type=Path, help="interpreter whose torch may be reused (default: this one)")
    parser.add_argument(
        "--oldest", action="append", default=[], metavar="PACKAGE", help="hold PACKAGE at its lower bound"
    )
    options = parser.parse_args()

    if sys.version_info < (3, 10):  # noqa: UP036 - nothing has checked the calling interpreter yet
        raise SystemExit(f"lmmhooks needs Python 3.10 or later, not {sys.version.split()[0]}: make PYTHON=python3.11")
    donor = (options.donor or Path(sys.executable)).absolute()
    minimum = lower_bound("torch")
    interpreter = create(options.venv.absolute(), donor)

    if not in_range(probe(interpreter)["torch"], minimum) and in_range(probe(donor)["torch"], minimum):
        reuse(interpreter, donor)

    present = probe(interpreter)["torch"]
    keep = in_range(present, minimum)
    print(f"torch {present} is kept" if keep else "torch is not installed: taking the version of constraints.txt")
    constraints = f"torch=={present}\n" if keep else (ROOT / "constraints.txt").read_text(encoding="utf-8")
    constraints += "".join(f"{package}=={lower_bound(package)}.*\n" for package in options.oldest)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text(constraints, encoding="utf-8")
        target = f"{ROOT}[{options.extras}]" if options.extras else str(ROOT)
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "-c", str(pins)]
        status = subprocess.run([*install, "-e", target, *options.oldest]).returncode
        if status == 0 and "dev" in options.extras.split(",") and not (interpreter.parent / "ruff").exists():
            # Only the calling interpreter has it: importable from here, but a program is looked for in our own folder.
            status = subprocess.run([*install, "--ignore-installed", "--no-deps", "ruff"]).returncode
        raise SystemExit(status)


if __name__ == "__main__":
    main()
