"""``lmmhooks doctor``."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import typer

from lmmhooks.cli.output import JsonOption, console, print_json, print_table

app = typer.Typer(rich_markup_mode=None, add_completion=False)

GIB = 1 << 30


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Show versions, devices and attention backends, what would be used and why; exit 1 if something is in the way."""
    from lmmhooks_eval.environment import source_state, versions

    problems = _problems()
    findings = {
        "versions": versions(),
        **source_state(),
        "python": sys.executable,
        "platform": platform.platform(),
        "devices": _devices(),
        "attention": _attention(),
        "images": _images(),
        "would_use": _choice(),
        "plugins": _plugins(),
        "problems": problems,
    }
    if json:
        print_json(findings)
    else:
        _print(findings)
    if problems:
        raise typer.Exit(1)


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        memory = round(about.total_memory / GIB, 1)
        found.append({"device": f"cuda:{index}", "name": about.name, "memory_gib": memory, "capability": capability})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor() or "Apple GPU"})
    found.append({"device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()})
    return found


def _attention() -> dict[str, str]:
    """Per backend, `available` or what is missing."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    flash = "available" if is_flash_attn_2_available() else _flash_obstacle()
    flex = "available" if is_torch_flex_attn_available() else "needs torch 2.5 or later"
    return {"sdpa": "available", "eager": "available", "flash_attention_2": flash, "flex_attention": flex}


def _flash_obstacle() -> str:
    import torch

    if find_spec("flash_attn") is None:
        needs_gpu = "" if torch.cuda.is_available() else "; it runs on CUDA devices only"
        return f"not installed: pip install 'lmmhooks[flash]'{needs_gpu}"
    return "installed, but cannot be used: no CUDA device" if not torch.cuda.is_available() else "installed, too old"


def _images() -> str:
    if find_spec("torchvision") is not None:
        return "torchvision: fast image processors and video processors"
    return "no torchvision: PIL image processors; video processors are not available"


def _choice() -> dict[str, str]:
    """What `lmmhooks.load` takes when nothing is asked for, and the reason."""
    from lmmhooks.bench.options import resolve_device

    device = resolve_device(None)
    why = "the first CUDA device" if device.type == "cuda" else "there is no CUDA device"
    attention = "sdpa is transformers' default, and methods recompute only the rows they edit, so they keep its speed"
    return {"device": str(device), "dtype": "as saved", "attention": "sdpa", "why": f"{why}; {attention}"}


def _plugins() -> dict[str, dict[str, str]]:
    """Third-party entry points that failed to load, by group."""
    from lmmhooks.families import discover as discover_families
    from lmmhooks.family import Family
    from lmmhooks.methods.registry import broken_entry_points
    from lmmhooks_eval.tasks import discover as discover_tasks

    return {
        "lmmhooks.methods": broken_entry_points(),
        "lmmhooks.families": discover_families(Family)[1],
        "lmmhooks.tasks": {str(number): str(each) for number, each in enumerate(discover_tasks().failures)},
    }


def _problems() -> list[str]:
    """Requirements of this package that the environment does not meet."""
    from packaging.requirements import Requirement

    found = []
    for text in requires("lmmhooks") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name} is not installed: pip install '{text}'")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            found.append(f"{requirement.name} {have} is installed, {text} is needed: pip install '{text}'")
    return found


def _print(findings: dict[str, Any]) -> None:
    rows = [[name, have or "not installed"] for name, have in findings["versions"].items()]
    rows.append(["commit", f"{findings['commit']}{', changed' if findings['dirty'] else ''}"])
    rows += [
        [each["device"], ", ".join(f"{key} {value}" for key, value in each.items() if key != "device")]
        for each in findings["devices"]
    ]
    rows += [[f"attention {name}", state] for name, state in findings["attention"].items()]
    rows.append(["images", findings["images"]])
    choice = findings["would_use"]
    rows.append(["would use", f"{choice['device']}, {choice['dtype']}, {choice['attention']}"])
    rows.append(["because", choice["why"]])
    rows += [
        [f"plug-in {name}", f"failed to load: {reason}"]
        for group in findings["plugins"].values()
        for name, reason in group.items()
    ]
    print_table(["what", "found"], rows)
    for problem in findings["problems"]:
        console().print(f"problem: {problem}", markup=False)
