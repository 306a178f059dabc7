"""
Vision-aware head reinforcement: amplify the heads whose output moves most when the image is taken away.

Per sample and layer, heads are ranked by the distance between their outputs at the last prompt position with and
without the image. Heads that fire harder without the image are left out; those above the median are multiplied by a
gain, in the prompt and in the whole answer. Both readings go up the stack together, so that each layer is judged on
inputs that the layers below have already reinforced.

No code was released, and the paper leaves three points open. All positions of the prompt are reinforced, so that keys
and values read again later are those the heads were chosen on (UNVERIFIED). The reading without the image is reinforced
like the other (UNVERIFIED). The outlier rule takes the standard deviation of a sample (UNVERIFIED). A third-party port
ranks all layers on two plain readings instead, which is another method: ``mode="twopass"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.prompt import PromptContext

__all__ = ["Vhr", "divergence", "reinforced_heads"]

#: Models of the paper's main table: layer 1 and the last 14 of 32.
PUBLISHED = {("llava", 4096, 32): 14, ("llava_next", 4096, 32): 14}


def divergence(outputs: Tensor, without_image: Tensor, drop_outliers: bool, unbiased: bool) -> Tensor:
    """
    Vision-aware head divergence: how far the output of a head moves when the image is removed.

    Parameters
    ----------
    outputs, without_image
        ``[B, H, d]`` output of each head at the last prompt position, before the output projection.
    drop_outliers
        Set heads to 0 that stand out by one standard deviation both in divergence and in energy without the image.
    unbiased
        Standard deviation of a sample (H - 1) instead of that of a population.

    Returns
    -------
    Tensor
        ``[B, H]`` float32.
    """
    alone = without_image.float()
    moved = (outputs.float() - alone).norm(dim=-1)
    if not drop_outliers:
        return moved
    energy = alone.square().sum(dim=-1)
    return moved.masked_fill(_stands_out(moved, unbiased) & _stands_out(energy, unbiased), 0.0)


def reinforced_heads(moved: Tensor) -> Tensor:
    """Heads ``[B, H]`` bool above the median divergence of their row; half of an even number without ties."""
    return moved > moved.median(dim=-1, keepdim=True).values


def _stands_out(values: Tensor, unbiased: bool) -> Tensor:
    correction = min(int(unbiased), values.shape[-1] - 1)
    return values > values.mean(dim=-1, keepdim=True) + values.std(dim=-1, correction=correction, keepdim=True)


@dataclass(frozen=True)
class Vhr(AttentionMethod):
    """Vision-aware head reinforcement (see the module docstring)."""

    id: ClassVar[str] = "vhr"
    paper: ClassVar[str] = (
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, ACL 2025, 2412.13949"
    )
    rows: ClassVar[str] = "all"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The paper finds layer 1 unstable on hard benchmarks.
        "late": {"early_layers": ()},
    }

    alpha: float = setting(2.0, help="Gain of reinforced heads, at least 0. Paper: 2; 3 works, 4 destroys the text.")
    early_layers: tuple[int, ...] = setting((1,), help="Edited layers besides the last ones, 0-based. Paper: layer 1.")
    num_late_layers: int | None = setting(
        None, help="How many of the last layers are edited, at least 0. None: 14 of 32 (paper), scaled with the depth."
    )
    mode: Literal["layerwise", "twopass"] = setting(
        "layerwise",
        help="'layerwise': each layer is judged on reinforced inputs (paper); 'twopass': all layers on plain readings.",
    )
    drop_outliers: bool = setting(True, help="Leave out heads that fire harder without the image. Paper: True.")
    std: Literal["sample", "population"] = setting(
        "sample", help="Which standard deviation the outlier rule takes (UNVERIFIED; the default of torch)."
    )
    scale_text: bool = setting(
        True, help="Reinforce the reading without the image too, in 'layerwise' mode (UNVERIFIED)."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "early_layers", tuple(self.early_layers))
        self._require(self.alpha >= 0, "alpha", "at least 0")
        self._require(
            self.num_late_layers is None or self.num_late_layers >= 0, "num_late_layers", "at least 0 or None"
        )
        self._require(self.mode in ("layerwise", "twopass"), "mode", "'layerwise' or 'twopass'")
        self._require(self.std in ("sample", "population"), "std", "'sample' or 'population'")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        late = PUBLISHED.get((family.name, family.hidden_size, family.num_layers))
        return {} if late is None else {"num_late_layers": late}

    def check(self, family: Any) -> None:
        depth = family.num_layers
        self._require(all(0 <= layer < depth for layer in self.early_layers), "early_layers", f"in 0 ... {depth - 1}")
        self._require((self.num_late_layers or 0) <= depth, "num_late_layers", f"at most {depth}, the model's layers")

    def bind(self, family: Any) -> Vhr:
        if self.num_late_layers is not None:
            return self
        return replace(self, num_late_layers=max(1, round(family.num_layers * 14 / 32)))

    @property
    def contrasts_text(self) -> bool:
        return self.mode == "layerwise"

    @property
    def is_identity(self) -> bool:
        return self.alpha == 1 or (not self.early_layers and self.num_late_layers == 0)

    def layers(self, family: Any) -> Sequence[int]:
        assert self.num_late_layers is not None, "filled in by bind"
        late = range(family.num_layers - self.num_late_layers, family.num_layers)
        return sorted({*self.early_layers, *late})

    def prepare(self, prompt: PromptContext) -> None:
        if self.mode == "layerwise" or not bool(prompt.layout.visual.any()):
            return
        layers = self.layers(prompt.family)
        with_image, without = (prompt.passes.head_outputs(layers, image=image) for image in (True, False))
        for layer in layers:
            prompt.memory[layer] = self.gains(with_image[layer], without[layer], prompt.layout.visual)

    def choose_heads(self, outputs: Tensor, without_image: Tensor, context: AttentionContext) -> Tensor:
        gains = self.gains(outputs, without_image, context.layout.visual)
        context.memory[context.layer] = gains
        return gains if self.scale_text else torch.ones_like(gains)

    def gains(self, outputs: Tensor, without_image: Tensor, visual: Tensor) -> Tensor:
        """Gain ``[B, H]`` of every head; 1 in rows of which ``visual [B, N]`` says that they have no image."""
        chosen = reinforced_heads(divergence(outputs, without_image, self.drop_outliers, self.std == "sample"))
        # Without an image both readings are the same, and what differs is rounding.
        chosen = chosen & visual.any(dim=1, keepdim=True).to(chosen.device)
        return torch.where(chosen, self.alpha, 1.0)

    def scale_heads(self, queries: Tensor, outputs: Tensor, context: AttentionContext) -> Tensor | None:
        # Nothing was compared where no row of the batch has an image.
        gains: Tensor | None = context.memory.get(context.layer)
        return None if gains is None else gains.to(outputs.device)[:, :, None, None]
