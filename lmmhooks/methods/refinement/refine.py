"""
Any method's map with any method's picture: ``refine(map='carve', operator='attwarp')``.

Every method of the common shape is a map of what matters, a picture made with it and a choice of the pictures that the
second answer is given. Here they come from different methods, settings and all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import LookAgain
from lmmhooks.methods.refinement.nested import MapOfAnother, bound, look_again

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks.methods.refinement.saliency import Saliency

__all__ = ["Refine"]


@dataclass(frozen=True)
class Refine(MapOfAnother):
    """Look as one method, act on the picture as another."""

    id: ClassVar[str] = "refine"
    paper: ClassVar[str] = "none: combines the parts of the methods it names"

    map: str = setting("carve", help="Method whose map it is, with settings if need be: 'carve(share=0.1)'.")
    operator: str = setting(
        "attwarp", help="Method that makes the picture, with settings if need be: 'api(strength=0.5)'."
    )
    show: str | None = setting(  # type: ignore[assignment] # None stands for the operator's
        None, help="Pictures of the second answer: 'both', 'refined'; unset: those the operator shows."
    )

    def __post_init__(self) -> None:
        if self.show is None:
            object.__setattr__(self, "show", look_again(self.id, "operator", self.operator).show)
        super().__post_init__()

    @cached_property
    def painter(self) -> LookAgain:
        """The method that makes the picture."""
        return look_again(self.id, "operator", self.operator)

    @property
    def is_identity(self) -> bool:
        return self.show == "refined" and self.painter.is_identity

    def check(self, family: Any) -> None:
        super().check(family)
        self.painter.check(family)

    def bind(self, family: Any) -> Refine:
        return replace(super().bind(family), operator=bound(self.painter, family).spec())  # type: ignore[return-value,call-arg]

    def refined(self, image: Image, saliency: Saliency) -> Image:
        return self.painter.refined(image, saliency)

    def question(self, prompt: str) -> str:
        return self.painter.question(prompt)
