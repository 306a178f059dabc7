"""
What every method is; each kind adds its contract in ``methods/<kind>/base.py``.

A method is a frozen dataclass. Its fields are its hyper-parameters, checked on construction; its class attributes say
what it needs; its functions receive plain tensors and never see hooks, caches or model code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lmmhooks.errors import MethodError
from lmmhooks.methods.tensors import TensorSet

__all__ = ["KINDS", "Hyperparameter", "Method", "names_record", "setting"]

KINDS = ("attention", "reduction", "decoding", "refinement")


@dataclass(frozen=True)
class Hyperparameter:
    """One documented setting of a method."""

    name: str
    default: Any
    required: bool
    help: str


def setting(default: Any = dataclasses.MISSING, *, help: str, **kwargs: Any) -> Any:
    """
    Declare a hyper-parameter with its documentation.

    Parameters
    ----------
    default
        Its default; leave out for a required one.
    help
        Meaning, unit, range and source of the default, in one or two sentences.
    """
    return field(default=default, metadata={"help": help}, **kwargs)


@dataclass(frozen=True)
class Method:
    """
    Base of all methods.

    Class attributes a method sets: ``id`` (name in lower case, as in its paper), ``kind``, ``paper`` (title, venue,
    arXiv id) and ``code`` (official repository, empty when there is none).
    """

    id: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str] = ""
    code: ClassVar[str] = ""
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {}
    """
    Settings that depend on the checkpoint: ``None`` means "as measured on it", a text that ends in ``.json`` names a
    record of `lmmhooks calibrate`. ``"wrap"``: measured in seconds the first time a model is wrapped. ``"command"``:
    measured by `lmmhooks calibrate` alone, because it needs a task or minutes; without a record `wrap` refuses.
    """
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named groups of settings, chosen with ``name(preset='...')``; settings given beside it win."""
    conflicts: ClassVar[Mapping[str, str]] = {}
    """Ids of methods that contradict this one, each with the reason as a clause."""

    @classmethod
    def hyperparameters(cls) -> dict[str, Hyperparameter]:
        """The settings of the method by name, with defaults and documentation."""
        found = {}
        for item in _settable(cls):
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            default = None if required else item.default
            found[item.name] = Hyperparameter(item.name, default, required, item.metadata.get("help", ""))
        return found

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        """
        Published settings for a model.

        Parameters
        ----------
        family
            A :class:`~lmmhooks.family.Family`.

        Returns
        -------
        dict
            Hyper-parameters that differ from the class defaults for this model; empty when none are published.
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """All hyper-parameters as JSON-compatible values; part of the identity of every stored answer."""
        return {item.name: _plain(getattr(self, item.name)) for item in _settable(self)}

    def spec(self) -> str:
        """Canonical text of the method, readable by :func:`lmmhooks.methods.resolve`; defaults are left out."""
        changed = []
        for item in _settable(self):
            value = getattr(self, item.name)
            if item.default is dataclasses.MISSING or value != item.default:
                changed.append(f"{item.name}={_plain(value)!r}")
        return f"{self.id}({', '.join(changed)})" if changed else self.id

    def check(self, family: Any) -> None:
        """
        Refuse a model this method cannot run on, before anything runs.

        Called on the method as given, and again when settings were filled in that had been measured.

        Raises
        ------
        MethodError, ModelError
            With the reason and what would work.
        """

    def bind(self, family: Any) -> Method:
        """The method with every model-dependent ``None`` filled in (thresholds that scale with width, say)."""
        return self

    def parts(self) -> tuple[Method, ...]:
        """
        What the engines attach: the method itself, or its pieces where it acts at several kinds of place.

        A method that edits attention and contrasts branches, say, names an attention method and a decoding method here.
        """
        return (self,)

    @property
    def is_identity(self) -> bool:
        """Whether these settings cannot change anything; nothing is attached then, so output is bit-identical."""
        return False

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        """Raise :class:`MethodError` naming the field, the value given and what is allowed."""
        if not condition:
            raise MethodError(f"{self.id}: {name}={getattr(self, name)!r} is not allowed; {name} must be {allowed}")


def names_record(value: Any) -> bool:
    """Whether the value of a setting in `Method.calibrated` is the path of a record of `lmmhooks calibrate`."""
    return isinstance(value, str) and value.endswith(".json")


def _settable(method: Any) -> list[dataclasses.Field[Any]]:
    """Fields a user may set; a subclass fixes an inherited one with ``field(default=..., init=False)``."""
    return [item for item in dataclasses.fields(method) if item.init]


def _plain(value: Any) -> Any:
    if isinstance(value, TensorSet):
        return value.plain()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    return value
