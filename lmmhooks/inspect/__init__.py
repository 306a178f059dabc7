"""
Looking into a model: where its attention goes, and why.

`sinks` finds attention sinks; nothing here changes what the model computes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmhooks.inspect.detectors import Criteria
    from lmmhooks.inspect.diagnosis import sinks
    from lmmhooks.inspect.report import SinkReport

__all__ = ["Criteria", "SinkReport", "sinks"]

_HOMES = {
    "Criteria": "lmmhooks.inspect.detectors",
    "SinkReport": "lmmhooks.inspect.report",
    "sinks": "lmmhooks.inspect.diagnosis",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lmmhooks.inspect' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
