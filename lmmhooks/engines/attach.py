"""The one record of everything that was attached to a model, able to take all of it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Attachments"]

_ABSENT = object()


class Attachments:
    """
    Attaches hooks, instance attributes and configuration values, and undoes them in reverse order.

    Undoing is idempotent, continues past a failing step (and reports the first failure at the end), and restores
    exactly what was there: an instance attribute that did not exist is deleted, not set to its class value.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self.described: list[str] = []

    def __len__(self) -> int:
        return len(self._undo)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any], name: str, *, first: bool = False) -> None:
        """Attach a forward pre-hook that receives ``(module, args, kwargs)``."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
        self._record(handle.remove, f"forward pre-hook {name}")

    def hook(
        self, module: nn.Module, hook: Callable[..., Any], name: str, *, always: bool = False, first: bool = False
    ) -> None:
        """
        Attach a forward hook that receives ``(module, args, kwargs, output)``.

        ``always``: after errors too; ``first``: before hooks that are there already.
        """
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always, prepend=first)
        self._record(handle.remove, f"forward hook {name}")

    def attribute(self, target: Any, name: str, value: Any, label: str) -> None:
        """Set an instance attribute until :meth:`undo`."""
        before = vars(target).get(name, _ABSENT)
        # Past nn.Module.__setattr__, which would register modules and refuse others.
        object.__setattr__(target, name, value)

        def restore() -> None:
            if before is _ABSENT:
                vars(target).pop(name, None)
            else:
                object.__setattr__(target, name, before)

        self._record(restore, f"attribute {label}")

    def undo(self) -> None:
        """Take back everything, last attached first."""
        failure: Exception | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failure = failure or error
        self.described.clear()
        if failure is not None:
            raise failure

    def _record(self, undo: Callable[[], None], description: str) -> None:
        self._undo.append(undo)
        self.described.append(description)
