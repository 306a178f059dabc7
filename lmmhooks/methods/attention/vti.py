"""
Visual and textual intervention: steer every layer along directions that were estimated once, on a few demonstrations.

The visual direction is the mean shift of vision features when an image is replaced by the average of many heavily
masked copies; the textual one is the shift of decoder states from captions with invented objects to correct ones. Each
MLP output is turned a little towards its layer's direction and keeps its length.

Directions are measured by ``lmmhooks calibrate vti``. Settings of the released code; its figures could not be verified
(UNVERIFIED). Differs from it in that the last layer's state is taken before the final norm, arithmetic is float32, and
towers whose number of tokens varies use the token mean of the visual direction (extension). As released, rows without
an image are steered by the textual direction too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch.nn.functional import normalize

from lmmhooks.methods.attention.steering import SteeringContext, SteeringMethod
from lmmhooks.methods.attention.turning import turn
from lmmhooks.methods.base import names_record, setting
from lmmhooks.methods.tensors import TensorSet

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Vti", "steer"]


def steer(x: Tensor, direction: Tensor, strength: float) -> Tensor:
    """
    Turn vectors ``[..., D]`` towards a direction, in float32; length and dtype stay.

    ``direction`` is broadcastable to ``x``; ``strength`` is its weight beside the normalised ``x``.
    """
    return turn(x, normalize(direction, dim=-1), strength).to(x.dtype)


@dataclass(frozen=True)
class Vti(SteeringMethod):
    """Visual and textual intervention (see the module docstring)."""

    id: ClassVar[str] = "vti"
    paper: ClassVar[str] = (
        "Reducing Hallucinations in Vision-Language Models via Latent Space Steering, ICLR 2025, 2410.15778"
    )
    code: ClassVar[str] = "https://github.com/shengliu66/VTI"
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {"directions": "command"}

    lam_image: float = setting(
        0.9, help="Strength of the visual direction, at least 0; 0: the vision tower is left alone. Released command."
    )
    lam_text: float = setting(
        0.9, help="Strength of the textual direction, at least 0; 0: the decoder is left alone. Released command."
    )
    factor: float = setting(0.1, help="Factor on both strengths, at least 0. Released code: 0.1.")
    directions: TensorSet | str | None = setting(
        None,
        help="Directions per layer: 'FILE.json', a record of `lmmhooks calibrate vti`; None: the record that command "
        "left for this checkpoint; or a TensorSet with 'textual' [L, D] and 'visual' [L, tokens, D].",
    )

    def __post_init__(self) -> None:
        for name in ("lam_image", "lam_text", "factor"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        known = self.directions is None or isinstance(self.directions, TensorSet) or names_record(self.directions)
        self._require(known, "directions", "the path of a record (.json), a TensorSet, or None")

    @property
    def is_identity(self) -> bool:
        return self.factor * max(self.lam_image, self.lam_text) == 0

    def check(self, family: Any) -> None:
        if not isinstance(self.directions, TensorSet):
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in self.directions.items()}
        wanted = (family.num_layers, family.hidden_size)
        fits = not self.lam_text or shapes.get("textual") == wanted
        self._require(fits, "directions", f"a set whose 'textual' has shape {list(wanted)} for this model")
        depth, visual = len(family.vision_layers), shapes.get("visual", ())
        fits = not self.lam_image or (len(visual) == 3 and visual[0] == depth)
        self._require(fits, "directions", f"a set whose 'visual' has shape [{depth}, tokens, width] for this model")

    def layers(self, family: Any) -> Sequence[int]:
        return range(family.num_layers) if self.lam_text else ()

    def vision_layers(self, family: Any) -> Sequence[int]:
        return range(len(family.vision_layers)) if self.lam_image else ()

    def edit_mlp(self, inputs: Tensor, outputs: Tensor, context: SteeringContext) -> Tensor:
        assert isinstance(self.directions, TensorSet)
        direction = self.directions.on(outputs.device)["textual"][context.layer]
        return steer(outputs, direction, self.factor * self.lam_text)

    def edit_vision_mlp(self, outputs: Tensor, layer: int, family: Any) -> Tensor:
        assert isinstance(self.directions, TensorSet)
        direction = self.directions.on(outputs.device)["visual"][layer]
        if outputs.dim() == 2 or outputs.shape[1] != direction.shape[0]:
            direction = direction.mean(dim=0)
        return steer(outputs, direction, self.factor * self.lam_image)
