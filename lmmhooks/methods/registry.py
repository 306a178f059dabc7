"""Finding methods by name and reading specifications such as ``"fastervlm(keep=128)"``."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from lmmhooks.errors import MethodError, closest
from lmmhooks.methods.base import KINDS, Method

__all__ = ["all_methods", "method", "resolve"]

ENTRY_POINT_GROUP = "lmmhooks.methods"


@lru_cache(maxsize=1)
def _shipped() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for kind in KINDS:
        try:
            package = import_module(f"lmmhooks.methods.{kind}")
        except ModuleNotFoundError as error:
            if error.name != f"lmmhooks.methods.{kind}":
                raise
            continue
        for info in pkgutil.iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{info.name}")
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__:
                    # A contract shared by several files of a kind carries no id of its own.
                    found |= {value.id: value} if "id" in vars(value) else {}
    return found


@lru_cache(maxsize=1)
def _third_party() -> tuple[dict[str, type[Method]], dict[str, str]]:
    """Classes from entry points, and for those that fail to import, the reason."""
    found: dict[str, type[Method]] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            found[point.name] = point.load()
        except Exception as error:
            broken[point.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, broken


def all_methods(kind: str | None = None) -> dict[str, type[Method]]:
    """
    Every method that can be used, shipped or added through the entry-point group ``lmmhooks.methods``.

    Parameters
    ----------
    kind
        Restrict to ``"attention"``, ``"reduction"``, ``"decoding"`` or ``"refinement"``.

    Returns
    -------
    dict
        ``{id: class}``, sorted by kind, then id.

    Raises
    ------
    MethodError
        For an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise MethodError(f"no kind of method is called {kind!r}; kinds: {', '.join(KINDS)}{closest(kind, KINDS)}")
    everything = {**_third_party()[0], **_shipped()}
    ordered = sorted(everything.items(), key=lambda item: (KINDS.index(item[1].kind), item[0]))
    return {name: cls for name, cls in ordered if kind is None or cls.kind == kind}


def broken_entry_points() -> dict[str, str]:
    """Third-party methods that failed to import: ``{name: reason}``."""
    return dict(_third_party()[1])


def method(name: str, **settings: Any) -> Method:
    """
    Build a method by name.

    Parameters
    ----------
    name
        An id such as ``"fastervlm"``.
    **settings
        Its hyper-parameters; those left out take the defaults of the method.

    Returns
    -------
    Method

    Raises
    ------
    MethodError
        Unknown name, unknown hyper-parameter, or a value out of range.

    Examples
    --------
    >>> lmmhooks.method("fastervlm", keep=128)
    """
    known = all_methods()
    if name not in known:
        if name in _third_party()[1]:
            raise MethodError(f"method {name!r} is installed but failed to import: {_third_party()[1][name]}")
        raise MethodError(
            f"unknown method {name!r}{closest(name, known)}; `lmmhooks methods` lists what there is"
            if closest(name, known)
            else f"unknown method {name!r}; known: {', '.join(known)}"
        )
    cls = known[name]
    if (preset := settings.pop("preset", None)) is not None:
        if preset not in cls.presets:
            listed = ", ".join(cls.presets) or "none"
            raise MethodError(f"{name} has no preset {preset!r}{closest(str(preset), cls.presets)}; it has: {listed}")
        settings = {**cls.presets[preset], **settings}
    fields = cls.hyperparameters()
    for key in settings:
        if key not in fields:
            listed = ", ".join(fields) or "none"
            raise MethodError(f"{name} has no hyper-parameter {key!r}{closest(key, fields)}; it has: {listed}")
    try:
        return cls(**settings)
    except TypeError as error:
        required = ", ".join(key for key, field in fields.items() if field.required)
        raise MethodError(f"{name}: {error}; required: {required or 'nothing'}") from None


def resolve(spec: str | Mapping[str, Any] | Method) -> Method:
    """
    Read a method from what users write.

    Parameters
    ----------
    spec
        A :class:`Method`; a name (``"var"``); a call (``"fastervlm(keep=128)"``, arguments are Python literals given
        by keyword); or a mapping ``{"fastervlm": {"keep": 128}}`` as in recipes.

    Returns
    -------
    Method

    Raises
    ------
    MethodError
        If it cannot be read, with the form expected.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise MethodError(f"a method given as a mapping has one key, its name; given: {', '.join(map(str, spec))}")
        name, settings = next(iter(spec.items()))
        return method(str(name), **dict(settings or {}))
    if not isinstance(spec, str):
        raise MethodError(f"a method is a name, 'name(key=value)' or a Method object, not {type(spec).__name__}")
    text = spec.strip()
    if "(" not in text:
        return method(text)
    # A name may hold hyphens, which Python's grammar does not know, so only the argument list is parsed as Python.
    name, _, arguments = text.partition("(")
    try:
        call = ast.parse(f"f({arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("arguments must be given as key=value")
        settings = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MethodError(f"cannot read method {spec!r} ({reason}); write name or name(key=value, ...)") from None
    return method(name.strip(), **settings)
