"""
What can be chosen: methods with where they run, and the strengths of those that were picked.

The text of a composition, such as ``"fastv(keep=0.5) + pai"``, is the one truth; controls read it and write it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import get_annotations
from math import ceil, floor, isfinite, log10
from typing import Any

from lmmhooks.cli.catalogue import describe_methods, support_matrix
from lmmhooks.cli.compositions import split_methods
from lmmhooks.errors import MethodError
from lmmhooks.family import Family
from lmmhooks.methods.base import Method
from lmmhooks.methods.registry import all_methods, method, resolve

__all__ = ["Choice", "Dial", "choices", "dials", "names", "picked", "read", "turned"]

KEEP = 0.5
"""Share of the visual tokens that a reducer starts with where its budget has no default."""
MOST_DIALS = 3
"""Of one method, its own settings before those of its kind; all others are changed in the text."""
STEPS = 100
"""In which the limit of a setting is looked for; none is declared in a form that a program could read."""


@dataclass(frozen=True)
class Choice:
    """
    One method that is on offer.

    Attributes
    ----------
    id, kind, summary
        As in the listing of methods.
    families
        Those on which the conformance tests ran it.
    spec
        What is written when it is picked.
    refusal
        Why the conformance tests found it refused on the family of this model; None where nothing is known against it.
        Settings that only this checkpoint refuses come out when it is asked.
    """

    id: str
    kind: str
    summary: str
    families: tuple[str, ...]
    spec: str
    refusal: str | None

    @property
    def label(self) -> str:
        """Name and kind, and a word where this model is refused."""
        return f"{self.id} ({self.kind}{', not on this model' if self.refusal else ''})"


@dataclass(frozen=True)
class Dial:
    """
    A number of a picked method that a slider may change.

    Attributes
    ----------
    place
        Which method of the composition, 0-based.
    method, setting, help
        Names, and what the setting means.
    value, low, high, step
        Where the slider stands, and its range: within what the method allows.
    """

    place: int
    method: str
    setting: str
    help: str
    value: float
    low: float
    high: float
    step: float


def choices(family: Family) -> list[Choice]:
    """Every method that is installed, in the order of kinds. Nothing is loaded for it, and nothing asks a network."""
    described, support = describe_methods(), support_matrix()
    found = []
    for name, cls in all_methods().items():
        modes = support.get(name, {})
        ran = tuple(each for each, results in modes.items() if "yes" in results.values())
        here = modes.get(family.name, {})
        refusal = next(iter(here.values())) if here and family.name not in ran else None
        about = described[name]
        found.append(Choice(name, about["kind"], about["summary"], ran, _start(name, cls), refusal))
    return found


def _start(name: str, cls: type[Method]) -> str:
    """Specification to begin with: the defaults, and half of the tokens where a budget has to be given."""
    fields = cls.hyperparameters()
    if "keep" not in fields or fields["keep"].default is not None:
        return name
    try:
        return method(name, keep=KEEP).spec()
    except MethodError:
        return name


def read(text: str) -> list[Method]:
    """
    The methods of a composition.

    Raises
    ------
    MethodError
        Nothing was picked, or what is written cannot be read.
    """
    if not text.strip():
        raise MethodError("no method is picked; pick one from the list, or write one such as fastv(keep=0.5)")
    return [resolve(part) for part in split_methods(text)]


def names(text: str) -> list[str]:
    """Ids of the methods of a composition, in its order; empty while it cannot be read."""
    try:
        return [each.id for each in read(text)]
    except MethodError:
        return []


def picked(text: str, wanted: Sequence[str], offered: Sequence[Choice]) -> str:
    """
    The composition after a change of the list: methods that stay keep their settings, new ones come last.

    Parameters
    ----------
    text
        Before the change.
    wanted
        Ids picked now.
    offered
        What `choices` returned.
    """
    try:
        before = read(text)
    except MethodError:
        before = []
    kept = {each.id: each.spec() for each in before if each.id in wanted}
    start = {each.id: each.spec for each in offered}
    added = {name: start[name] for name in wanted if name not in kept}
    return " + ".join([*kept.values(), *added.values()])


def dials(text: str, family: Family) -> list[Dial]:
    """
    The strengths of the methods of a composition: how much a reducer keeps, then numbers that are no counts or places.

    Ranges are asked of the methods, which refuse what they do not allow. Empty while the text cannot be read.
    """
    try:
        methods = read(text)
    except MethodError:
        return []
    return [dial for place, each in enumerate(methods) for dial in _dials_of(place, each, family)]


def _dials_of(place: int, each: Method, family: Family) -> list[Dial]:
    published = each.defaults_for(family)
    settings = each.hyperparameters()
    found = []
    for name in sorted(settings, key=lambda name: (name != "keep", _depth(type(each), name))):
        about = settings[name]
        given = getattr(each, name)
        value: Any = published.get(name) if given is None else given
        span = _span(each, name, value, about.default, family)
        if span is not None:
            low, high, step = span
            found.append(Dial(place, each.id, name, about.help, value, min(low, value), max(high, value), step))
    return found[:MOST_DIALS]


def _depth(cls: type[Method], name: str) -> int:
    """How many classes above a method's own its setting was declared."""
    declared = (depth for depth, parent in enumerate(cls.__mro__) if name in get_annotations(parent))
    return next(declared, len(cls.__mro__))


def _span(each: Method, name: str, value: Any, default: Any, family: Family) -> tuple[float, float, float] | None:
    """Lowest and highest value and step of a slider; None for a setting that is no strength."""
    if name == "keep" and isinstance(value, int) and not isinstance(value, bool):
        return 1, max(family.tokens_per_image or 0, value), 1
    if not isinstance(value, float) or not isfinite(value):
        return None
    usual = default if isinstance(default, float) and default else value
    # Shares end at 1; strengths have no end, and twice the usual value shows what more of it does.
    share = abs(usual) <= 1 and not _allows(each, name, 1.0 + 1e-6)
    high = _reached(each, name, value, 1.0 if share else 2.0 * max(abs(usual), 0.5))
    low = _reached(each, name, value, 0.0)
    if low >= high:
        return None
    step = 10.0 ** floor(log10((high - low) / 50))
    # Onto the grid of the steps, on which a slider counts from its lowest value.
    return round(ceil(low / step - 1e-6) * step, 9), round(floor(high / step + 1e-6) * step, 9), step


def _reached(each: Method, name: str, value: float, end: float) -> float:
    """The end of a range, or as near to it as the method allows."""
    points = (end + (value - end) * k / STEPS for k in range(STEPS))
    return next((point for point in points if _allows(each, name, point)), value)


def _allows(each: Method, name: str, value: float) -> bool:
    try:
        replace(each, **{name: value})
    except MethodError:
        return False
    return True


def turned(text: str, dial: Dial, value: float) -> str:
    """
    The composition after a slider was moved.

    Raises
    ------
    MethodError
        The text has changed so that the dial's method is not there any more, or the method refuses the value.
    """
    methods = read(text)
    if dial.place >= len(methods) or methods[dial.place].id != dial.method:
        raise MethodError(f"{dial.method} is no longer the method in place {dial.place + 1}; read the text again")
    given = int(value) if isinstance(getattr(methods[dial.place], dial.setting), int) else round(float(value), 6)
    methods[dial.place] = replace(methods[dial.place], **{dial.setting: given})
    return " + ".join(each.spec() for each in methods)
