"""
One module per model family that deviates from the generic resolution.

Families are found by scanning this package, so there is nothing to register; other packages add theirs through the
entry-point group ``lmmhooks.families``.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

__all__ = ["discover"]


def discover(base: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Every family class there is.

    Parameters
    ----------
    base
        `lmmhooks.family.Family`; handed in because that module is below this package.

    Returns
    -------
    tuple of dict
        Classes by model type, sorted, a plug-in's replacing a shipped one of its type; and the plug-ins that failed
        to load, with the reason.
    """
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if _is_family(value, base) and value.__module__ == module.__name__:
                found.update(dict.fromkeys(value.model_types, value))
    broken: dict[str, str] = {}
    for point in entry_points(group="lmmhooks.families"):
        try:
            family = point.load()
            if not _is_family(family, base) or not family.model_types:
                raise TypeError(f"{point.value} is not a Family class with model_types")
            found.update(dict.fromkeys(family.model_types, family))
        except Exception as error:
            # Another package may fail in any way; that must not take the shipped families down with it.
            broken[point.name] = f"{type(error).__name__}: {error}"
    return dict(sorted(found.items())), broken


def _is_family(value: Any, base: Any) -> bool:
    return isinstance(value, type) and issubclass(value, base)
