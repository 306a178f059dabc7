"""
lmmhooks: attention redistribution, visual token reduction and contrastive decoding as exact, reversible plug-ins.

Importing this package registers nothing and touches nothing global; names are loaded on first use, so that the
command line starts without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmhooks import inspect, methods
    from lmmhooks.comparison import Comparison, compare
    from lmmhooks.errors import LmmhooksError, MethodError, ModelError, PromptError
    from lmmhooks.family import Family
    from lmmhooks.layout import Layout
    from lmmhooks.loading import load
    from lmmhooks.methods.registry import method
    from lmmhooks.patch import Patch, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Family",
    "Layout",
    "LmmhooksError",
    "MethodError",
    "ModelError",
    "Patch",
    "PromptError",
    "compare",
    "inspect",
    "load",
    "method",
    "methods",
    "unwrap",
    "wrap",
]

_HOMES = {
    "Comparison": "lmmhooks.comparison",
    "Family": "lmmhooks.family",
    "Layout": "lmmhooks.layout",
    "LmmhooksError": "lmmhooks.errors",
    "MethodError": "lmmhooks.errors",
    "ModelError": "lmmhooks.errors",
    "Patch": "lmmhooks.patch",
    "PromptError": "lmmhooks.errors",
    "compare": "lmmhooks.comparison",
    "load": "lmmhooks.loading",
    "method": "lmmhooks.methods.registry",
    "unwrap": "lmmhooks.patch",
    "wrap": "lmmhooks.patch",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("inspect", "methods"):
        return import_module(f"lmmhooks.{name}")
    raise AttributeError(f"module 'lmmhooks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
