"""The wheel holds everything it needs: built, installed into an empty environment, used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.packaging


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE"))}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation: hatchling is installed here, and the tests work offline.
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """
    The `bin` folder of an environment that holds this wheel and nothing else of the project.

    Dependencies come from the environment that runs the tests: its site folders are put on the path, without
    processing their path files, so that an editable install of the checkout there stays out of sight.
    """
    venv = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv).returncode == 0
    (site,) = venv.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(shared) + "\n")
    python = venv / "bin" / "python"
    done = run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=venv,
    )
    assert done.returncode == 0, done.stderr
    where = "import lmmhooks, lmmhooks_eval; print(lmmhooks.__file__); print(lmmhooks_eval.__file__)"
    for line in run(python, "-c", where, cwd=venv).stdout.splitlines():
        assert line.startswith(str(site)), "the checkout is tested instead of the wheel"
    return venv / "bin"


def test_contents(wheel) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "lmmhooks/py.typed",
        "lmmhooks/methods/attention/var.py",
        "lmmhooks_eval/py.typed",
        "lmmhooks_eval/recipes/quickstart.yaml",
        "lmmhooks_eval/tiny/weights/tiny-llava/model.safetensors",
        "lmmhooks_eval/tiny/data/scenes_pope.jsonl",
    ):
        assert needed in names, needed
    folder, checkout = "lmmhooks_eval/recipes/", ROOT / "recipes"
    shipped = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    assert shipped == {path.relative_to(checkout).as_posix() for path in checkout.rglob("*.yaml")}
    assert any(name.startswith("reproduce/offline/") for name in shipped)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lmmhooks", "lmmhooks_eval", *(top for top in tops if top.endswith(".dist-info"))}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # Two bundled models of at most 12 MB each and the benchmark's images.
    assert wheel.stat().st_size < 40e6


def test_recipes_are_found(installed, tmp_path) -> None:
    done = run(installed / "lmmhooks", "recipes", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"quickstart", "reproduce/vista-llava-1.5-7b-chair"} <= json.loads(done.stdout).keys()


def test_quickstart_runs_from_another_folder(installed, tmp_path) -> None:
    done = run(installed / "lmmhooks", "run", "quickstart", "--limit", "4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    folder = tmp_path / result["run"]
    assert folder.is_relative_to(tmp_path)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "samples.jsonl",
        "metrics.json",
        "env.json",
        "report.html",
    }
