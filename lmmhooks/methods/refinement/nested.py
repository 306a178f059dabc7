"""Methods that take their map, or what is done with it, from another method of the common shape."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import Look, LookAgain
from lmmhooks.methods.registry import resolve

if TYPE_CHECKING:
    from lmmhooks.methods.refinement.saliency import Saliency

__all__ = ["MapOfAnother", "bound", "look_again"]


def look_again(owner: str, name: str, spec: str) -> LookAgain:
    """
    The method that a setting names.

    Parameters
    ----------
    owner
        Id of the method whose setting it is, and ``name`` of the setting.
    name
        See there.
    spec
        As users write it: ``"carve"`` or ``"carve(share=0.1)"``.

    Raises
    ------
    MethodError
        It cannot be read, or is a method without map and picture.
    """
    found = resolve(spec)
    if not isinstance(found, LookAgain):
        raise MethodError(
            f"{owner}: {name}={spec!r} is not allowed; {found.id} makes no map and no picture that could be exchanged"
        )
    return found


def bound(method: LookAgain, family: Any) -> LookAgain:
    """A method with its settings filled in for a model, as `lmmhooks.wrap` does it."""
    method.check(family)
    published = {k: v for k, v in method.defaults_for(family).items() if getattr(method, k) is None}
    return replace(method, **published).bind(family)  # type: ignore[return-value] # methods bind to their own kind


@dataclass(frozen=True)
class MapOfAnother(LookAgain):
    """Looks as another method does."""

    # Where cells lie is a setting of the method that makes the map.
    geometry: str = field(default="true", init=False)
    map: str = setting("vicrop-rel", help="Method whose map it is, with settings if need be: 'carve(share=0.1)'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Read now, so that a wrong name is found where it is written.
        assert self.source

    @cached_property
    def source(self) -> LookAgain:
        """The method that makes the map."""
        return look_again(self.id, "map", self.map)

    def check(self, family: Any) -> None:
        self.source.check(family)

    def bind(self, family: Any) -> MapOfAnother:
        return replace(self, map=bound(self.source, family).spec())

    def layers(self, family: Any) -> tuple[int, ...]:
        return self.source.layers(family)

    def gradient_layers(self, family: Any) -> tuple[int, ...]:
        return self.source.gradient_layers(family)

    def saliency(self, look: Look) -> Saliency:
        return self.source.saliency(look)
