"""
Every method, one file each, grouped by kind.

``lmmhooks.methods`` is this package and at the same time a function: ``lmmhooks.methods()`` returns all methods as
``{id: class}`` and ``lmmhooks.methods(kind="attention")`` those of one kind.
"""

from __future__ import annotations

import sys
import types

from lmmhooks.methods.registry import all_methods, method, resolve

__all__ = ["all_methods", "method", "resolve"]


class _CallablePackage(types.ModuleType):
    # The public contract has `lmmhooks.methods()` next to the package `lmmhooks.methods`. Importing a submodule binds
    # the package on its parent, so a function of that name cannot survive; a callable module serves both.
    __call__ = staticmethod(all_methods)


sys.modules[__name__].__class__ = _CallablePackage
