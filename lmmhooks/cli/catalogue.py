"""What there is, as plain data: methods and families described by their own code. Listings and README read this."""

from __future__ import annotations

import inspect
import json
import re
import sys
from importlib.resources import files
from typing import Any

__all__ = ["describe_families", "describe_methods", "support_matrix"]

MARK = "UNVERIFIED"
"""How method files mark what could be checked against neither the paper nor the released code."""


def _first_sentence(text: str) -> str:
    """First sentence of a docstring; families and methods put what they are there."""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


def describe_methods() -> dict[str, dict[str, Any]]:
    """
    Describe every method: kind, what it does, sources, settings with defaults and help, presets.

    Returns
    -------
    dict
        By id, in the order of kinds. ``unverified`` lists what could be checked against neither paper nor released
        code: sentences of the description, and settings by name; empty where everything could.
    """
    from lmmhooks.methods.registry import all_methods

    described = {}
    for name, cls in all_methods().items():
        module = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
        about = inspect.cleandoc(module)
        described[name] = {
            "kind": cls.kind,
            "summary": _first_sentence(module),
            "about": about,
            "unverified": _unverified(about, cls),
            "paper": cls.paper,
            "code": cls.code,
            "source": cls.__module__.replace(".", "/") + ".py",
            "settings": {
                key: {"default": _plain(each.default), "required": each.required, "help": each.help}
                for key, each in cls.hyperparameters().items()
            },
            "measured_on_the_checkpoint": dict(cls.calibrated),
            "presets": {key: dict(value) for key, value in cls.presets.items()},
            "conflicts": dict(cls.conflicts),
        }
    return described


def _unverified(about: str, cls: Any) -> list[str]:
    """Sentences of a description and settings that carry the mark UNVERIFIED."""
    sentences = re.split(r"(?<=[.:])\s+", " ".join(about.split()))
    marked = [sentence for sentence in sentences if MARK in sentence]
    return marked + [f"{key}: {each.help}" for key, each in cls.hyperparameters().items() if MARK in each.help]


def describe_families() -> dict[str, dict[str, Any]]:
    """
    Describe every model type with a family module of its own.

    Returns
    -------
    dict
        By model type: the class that serves it and what is special about it.
    """
    from lmmhooks.family import supported

    described = {}
    for name, cls in sorted(supported().items()):
        module = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
        described[name] = {
            "summary": _first_sentence(module),
            "about": inspect.cleandoc(module),
            "source": cls.__module__.replace(".", "/") + ".py",
        }
    return described


def support_matrix() -> dict[str, dict[str, Any]]:
    """
    Read which method ran on which family, as the conformance tests found it.

    Returns
    -------
    dict
        ``{method: {family: {mode: "yes" or why it is refused}}}``; empty if the file was not generated.
    """
    file = files("lmmhooks") / "support.json"
    if not file.is_file():
        return {}
    matrix: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return matrix


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set, frozenset, range)) else value
