"""What a result depends on besides its recipe: versions, source state, hardware, and what was really loaded."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe", "now", "source_state"]

_PACKAGES = ("lmmhooks", "torch", "transformers", "tokenizers", "accelerate", "numpy", "scipy", "pillow", "flash-attn")


def now() -> str:
    """UTC time in ISO format, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def source_state() -> dict[str, Any]:
    """Commit of the checkout this package runs from and whether it has changes; both None for an installed package."""
    here = Path(__file__).resolve().parent
    unknown = {"commit": None, "dirty": None}
    if not any((parent / ".git").exists() for parent in here.parents):
        return unknown
    try:
        commit, status = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=20).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide about an answer; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe(model: Any, identity: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, Any]:
    """
    The contents of ``env.json`` at the start of a run.

    Parameters
    ----------
    model
        The loaded model.
    identity
        `ModelIdentity` as a mapping.
    data
        Source of every task.
    """
    import torch

    device = model.device
    on_gpu = device.type == "cuda"
    return {
        "started": now(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions(),
        **source_state(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "model": dict(identity),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": dict(data),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
