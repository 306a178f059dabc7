"""
Looking into a model: where its attention goes, and why.

`sinks` finds attention sinks, `attention_map` shows where the model looks for every token of an answer; nothing here
changes what the model computes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmhooks.inspect.detectors import Criteria
    from lmmhooks.inspect.diagnosis import sinks
    from lmmhooks.inspect.maps.extract import attention_map
    from lmmhooks.inspect.maps.result import AttentionMap
    from lmmhooks.inspect.report import SinkReport

__all__ = ["AttentionMap", "Criteria", "SinkReport", "attention_map", "sinks"]

_HOMES = {
    "AttentionMap": "lmmhooks.inspect.maps.result",
    "attention_map": "lmmhooks.inspect.maps.extract",
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
