"""
VISTA: push every token towards what the image adds, and let layers before the last vote on the next word.

Visual evidence fades while an answer is written, and grounded words peak shortly before the last layer. The state of
the last prompt token with the image minus the one without gives a direction per layer; every MLP output is turned
towards it, more where it points away from it, and keeps its norm (visual steering vector). What the language head reads
is mixed with the states of late layers, without the final norm (self-logits augmentation).

Follows the released code where it differs from the paper: the MLP output is turned instead of the residual stream, with
unit vectors and a strength that depends on the angle, and the mixed layers include the last but one. Differs from it:
computed in float32; one state per layer instead of a PCA of one difference, which is the same; late states are averaged
before the head, which is linear, instead of after; rows without an image are left as they are. `hidden_states[-1]` of
an output is the mixed state. The layers mixed at depths other than 32 are UNVERIFIED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import normalize

from lmmhooks.methods.attention.steering import SteeringContext, SteeringMethod
from lmmhooks.methods.attention.turning import turn
from lmmhooks.methods.base import Method, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.prompt import PromptContext

__all__ = ["Vista", "steer"]


def steer(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """
    Turn states towards a direction without changing their norm.

    Parameters
    ----------
    states
        ``[..., D]``.
    direction
        Unit vectors, broadcastable to ``states``.
    strength
        Length of what is added to the unit vector of a state at right angles to the direction or closer to it; twice
        that for a state that points the opposite way.

    Returns
    -------
    Tensor
        Shape of ``states``, float32.
    """
    opposed = (-(normalize(states.float(), dim=-1) * direction).sum(dim=-1, keepdim=True)).clamp(min=0)
    return turn(states, direction, strength * (1 + opposed))


@dataclass(frozen=True)
class Vista(SteeringMethod):
    """Visual steering vector and self-logits augmentation (see the module docstring)."""

    id: ClassVar[str] = "vista"
    paper: ClassVar[str] = (
        "The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual Information "
        "Steering, ICML 2025, 2502.03628"
    )
    code: ClassVar[str] = "https://github.com/LzVv123456/VISTA"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The authors' scripts; InstructBLIP uses the settings of LLaVA-1.5.
        "captioning": {"lam": 0.17, "gamma": 0.3},
        "captioning-minigpt4": {"lam": 0.1, "gamma": 0.3},
        "captioning-shikra": {"lam": 0.12, "gamma": 0.3},
        "pope": {"lam": 0.01, "gamma": 0.3},
        "mmhal": {"lam": 0.1, "gamma": 0.3},
    }

    lam: float = setting(
        0.17,
        help="Strength of the steering, at least 0, in units of the norm of an MLP output. Authors' scripts: 0.17 for "
        "captions of LLaVA-1.5 (0.1 to 0.12 on others), 0.01 for yes/no questions; too much of it ruins the text.",
    )
    gamma: float = setting(0.3, help="Weight of the late layers in the logits, in [0, 1]. Paper: 0.3 for all models.")
    sla_layers: tuple[int, ...] | None = setting(
        None,
        help="Layers whose outputs are mixed into the logits, 0-based, ascending. None: 25 to 30 of 32 as released, "
        "and the same share of another depth, always without the last layer (UNVERIFIED).",
    )

    def __post_init__(self) -> None:
        self._require(self.lam >= 0, "lam", "at least 0")
        self._require(0 <= self.gamma <= 1, "gamma", "in [0, 1]")
        if self.sla_layers is not None:
            object.__setattr__(self, "sla_layers", tuple(self.sla_layers))
            ascending = list(self.sla_layers) == sorted(set(self.sla_layers))
            self._require(bool(self.sla_layers) and ascending, "sla_layers", "ascending layers, at least one, or None")

    def check(self, family: Any) -> None:
        outside = [layer for layer in self.sla_layers or () if not 0 <= layer < family.num_layers]
        self._require(not outside, "sla_layers", f"layers in [0, {family.num_layers}) of this model")

    def bind(self, family: Any) -> Method:
        if self.sla_layers is not None:
            return self
        last = max(family.num_layers - 2, 0)
        return replace(self, sla_layers=tuple(range(min(round(family.num_layers * 25 / 32), last), last + 1)))

    @property
    def is_identity(self) -> bool:
        return self.lam == 0 and self.gamma == 0

    def layers(self, family: Any) -> Sequence[int]:
        return range(family.num_layers) if self.lam else ()

    def read_layers(self, family: Any) -> Sequence[int]:
        return (self.sla_layers or ()) if self.gamma else ()

    def prepare(self, prompt: PromptContext) -> None:
        illustrated = prompt.layout.visual.any(dim=1)
        if not bool(illustrated.any()):
            return
        prompt.memory["illustrated"] = illustrated
        if self.lam:
            added = prompt.passes.last_hidden(image=True).float() - prompt.passes.last_hidden(image=False).float()
            prompt.memory["direction"] = normalize(added, dim=-1)[:, :, None]

    def edit_mlp(self, inputs: Tensor, outputs: Tensor, context: SteeringContext) -> Tensor:
        if "illustrated" not in context.memory:
            return outputs
        direction = context.memory["direction"][context.layer].to(outputs.device)
        return self._only_illustrated(steer(outputs, direction, self.lam), outputs, context)

    def read_layer(self, hidden: Tensor, context: SteeringContext) -> None:
        if "illustrated" in context.memory:
            if self.sla_layers and context.layer == self.sla_layers[0]:
                context.memory["late"] = []
            context.memory["late"].append((hidden, context.spread))

    def mix_output(self, normed: Tensor, context: SteeringContext) -> Tensor:
        late = context.memory.pop("late", None)
        if late is None:
            return normed
        final = normed.float()
        mean = torch.stack([spread(hidden, final) for hidden, spread in late]).mean(dim=0)
        return self._only_illustrated((1 - self.gamma) * final + self.gamma * mean, normed, context)

    @staticmethod
    def _only_illustrated(edited: Tensor, outputs: Tensor, context: SteeringContext) -> Tensor:
        # Two plain passes over a prompt without image differ by rounding, which must not become a direction.
        rows = context.memory["illustrated"].to(outputs.device)[:, None, None]
        return torch.where(rows, edited.to(outputs.dtype), outputs)
