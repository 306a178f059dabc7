"""`scripts/environment.py` never replaces a torch that is there and in range."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "environment.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment_with_torch(folder: Path, version: str | None) -> Path:
    """An environment whose torch is a folder with a version, and its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    if version is not None:
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
        info = site / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("version", "minimum", "inside"),
    [
        ("2.13.0+cpu", "2.6", True),
        ("2.6.0", "2.6", True),
        ("2.10.0", "2.6", True),  # not a comparison of texts
        ("2.5.1", "2.6", False),
        ("3.0", "2.6", True),
        (None, "2.6", False),
    ],
)
def test_range(script, version, minimum, inside) -> None:
    assert script.in_range(version, minimum) is inside


def test_bounds_come_from_pyproject(script) -> None:
    assert script.lower_bound("torch") == "2.6"
    assert script.lower_bound("transformers") == "5.17"
    with pytest.raises(SystemExit, match="no lower bound for 'abacus'"):
        script.lower_bound("abacus")


@pytest.mark.parametrize(
    ("own", "donors", "pin"),
    [
        (None, "2.9.1+cu130", "torch==2.9.1+cu130"),  # the caller's is made visible and pinned
        ("2.8.0", "2.9.1", "torch==2.8.0"),  # the environment's own wins
        (None, "2.4.0", "torch==2.13.0"),  # too old to reuse: pip chooses, held to constraints.txt
        (None, None, "torch==2.13.0"),
        ("2.4.0", None, "torch==2.13.0"),  # out of range in the environment: pip may replace it
    ],
)
def test_pins(script, own, donors, pin, tmp_path, monkeypatch) -> None:
    donor = environment_with_torch(tmp_path / "donor", donors)
    environment_with_torch(tmp_path / "venv", own)
    installed: list[str] = []
    original = subprocess.run

    def instead_of_pip(command, **options):
        if "pip" not in command:
            return original(command, **options)
        installed.extend(Path(command[command.index("-c") + 1]).read_text().splitlines())
        (tmp_path / "venv" / "bin" / "ruff").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", instead_of_pip)
    monkeypatch.setattr(sys, "argv", ["environment.py", str(tmp_path / "venv"), "--donor", str(donor)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert [line for line in installed if line.startswith("torch==")] == [pin]
    seen = original(
        [tmp_path / "venv" / "bin" / "python", "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
    )
    reused = pin.removeprefix("torch==") if pin != "torch==2.13.0" else (own or "")
    assert seen.stdout.strip() == reused


def test_oldest_pins_the_lower_bound(script, tmp_path, monkeypatch) -> None:
    donor = environment_with_torch(tmp_path / "donor", "2.9.1")
    environment_with_torch(tmp_path / "venv", None)
    commands: list[list[str]] = []
    original = subprocess.run

    def instead_of_pip(command, **options):
        if "pip" not in command:
            return original(command, **options)
        commands.append([*command, Path(command[command.index("-c") + 1]).read_text()])
        (tmp_path / "venv" / "bin" / "ruff").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", instead_of_pip)
    arguments = [str(tmp_path / "venv"), "--donor", str(donor), "--oldest", "transformers"]
    monkeypatch.setattr(sys, "argv", ["environment.py", *arguments])
    with pytest.raises(SystemExit):
        script.main()
    (command,) = commands
    assert "transformers" in command
    assert command[-1] == "torch==2.9.1\ntransformers==5.17.*\n"


def test_programs_of_the_caller_are_installed_again(script, tmp_path, monkeypatch) -> None:
    """pip is content with a linter that only the calling interpreter has, but the Makefile starts ours."""
    donor = environment_with_torch(tmp_path / "donor", "2.9.1")
    environment_with_torch(tmp_path / "venv", None)
    commands: list[list[str]] = []
    original = subprocess.run

    def instead_of_pip(command, **options):
        if "pip" not in command:
            return original(command, **options)
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", instead_of_pip)
    monkeypatch.setattr(sys, "argv", ["environment.py", str(tmp_path / "venv"), "--donor", str(donor)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert commands[1][-3:] == ["--ignore-installed", "--no-deps", "ruff"]
