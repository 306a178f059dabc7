"""
CausalMM: subtract what the model would say if its attention were uninformative; what remains is attention's effect.

Visual and language priors act through attention. In the visual counterfactual, patch features are weighted by a
uniform, random, reversed or shuffled map of the vision tower; in that of the language model, attention of decoder
layers is replaced as well, in a branch of its own.

Paper: "Mitigating Modality Prior-Induced Hallucinations in Multimodal Large Language Models via Deciphering Attention
Causality", ICLR 2025, arXiv 2410.04780. Code: https://github.com/The-Martyr/CausalMM (Apache-2.0). Differs from the
release in that branches have keys and values of their own: there they share the main branch's, so that from the second
token on nothing is contrasted (``first_token_only=True``). Random maps and permutations come from the seed alone, so
that no row depends on its neighbours. No run with language branches was released: their layers are UNVERIFIED.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.counterfactual import (
    MapEdit,
    RowEdit,
    attend_otherwise,
    counterfactual_map,
    patch_weights,
)
from lmmhooks.methods.decoding.view import BranchAttention, ImageView, StepView
from lmmhooks.methods.probe import Probe

__all__ = ["CausalMM"]


def _weights_of_patches(edit: MapEdit, seed: int, has_cls: bool, query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """``[crops, patches]`` from queries and keys ``[crops, H, N, d]`` of a vision layer."""
    num = query.shape[2]
    if edit == "uniform":
        # Every row of a map sums to 1, so its mean is known.
        return query.new_full((len(query), num - has_cls), 1 / num, dtype=torch.float32)
    attention = torch.softmax((query @ key.transpose(2, 3) * scaling).float(), dim=-1)
    return patch_weights(counterfactual_map(attention, edit, seed), math.isqrt(num - has_cls))


@dataclass(frozen=True)
class CausalMM(DecodingMethod):
    """
    Contrast with counterfactual attention: ``(1 + n gamma) L - gamma (L_1 + ... + L_n)`` over n branches.

    The visual weights of ``"uniform"`` and, but for its scatter, ``"shuffle"`` are 1/577 on LLaVA: that branch is close
    to one without an image. Where patches do not become tokens one by one, tokens are weighted behind the projector, by
    the mean of their patches: UNVERIFIED. Towers that take images of any size have no map but the uniform one.
    """

    id: ClassVar[str] = "causalmm"
    paper: ClassVar[str] = "Deciphering Attention Causality, ICLR 2025, arXiv 2410.04780"
    code: ClassVar[str] = "https://github.com/The-Martyr/CausalMM"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pope-script": {"beta": 0.6},  # nearly greedy: compare with the cut alone
    }

    gamma: float = setting(1.0, help="Strength of every contrast, 0 or more (script: 1); 0: no branches.")
    vision: Literal["random", "uniform", "reversed", "shuffle"] | None = setting(
        "shuffle",
        help="Counterfactual map of the vision tower: 'random', 'uniform', 'reversed', 'shuffle' (script), None.",
    )
    language: Literal["reverse", "random", "uniform"] | None = setting(
        None, help="Counterfactual attention of decoder layers: 'reverse', 'random', 'uniform', or None (as released)."
    )
    layers: tuple[int, ...] | None = setting(
        None,
        help="Decoder layers, 0-based, that the language branch changes. None: all of them (the paper compares early, "
        "middle and late groups; sets UNVERIFIED).",
    )
    renormalize: bool = setting(False, help="Let counterfactual rows of the decoder sum to 1; as released they do not.")
    first_token_only: bool = setting(
        False, help="Contrast the first token alone, which is what the released code comes to; the cut stays."
    )
    seed: int = setting(0, help="Seed of random maps and permutations, 0 or more.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.gamma >= 0, "gamma", "0 or more")
        for name, edits in (("vision", MapEdit), ("language", RowEdit)):
            allowed = get_args(edits)
            self._require(getattr(self, name) in (*allowed, None), name, f"one of {', '.join(allowed)}, or None")
        self._require(self.language is not None or not self.renormalize, "renormalize", "False without language")
        self._require(self.language is not None or self.layers is None, "layers", "None without language")
        self._require(self.seed >= 0, "seed", "0 or more")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def is_identity(self) -> bool:
        return self.beta == 0 and not (self.gamma and (self.vision or self.language))

    def check(self, family: Any) -> None:
        if wrong := [layer for layer in self.layers or () if not 0 <= layer < family.num_layers]:
            raise MethodError(
                f"{self.id}: layers={self.layers} names layer {wrong[0]}; the decoder has layers 0 to "
                f"{family.num_layers - 1}"
            )
        several = getattr(family.model.config, "vision_feature_layer", None)
        if self.vision and family.projects_patches and isinstance(several, (list, tuple)) and len(several) > 1:
            raise MethodError(
                f"{self.id}: the projector of {type(family.model).__name__} reads vision layers {list(several)} at "
                "once, of which there is no one map; use vision=None"
            )
        if self.vision not in (None, "uniform") and not _square_crops(family):
            raise MethodError(
                f"{self.id}: vision={self.vision!r} resizes the attention map of a square crop, but the tower of model "
                f"type {family.name!r} takes images of any size; use vision='uniform' or vision=None"
            )

    def branches(self, family: Any) -> list[Branch]:
        found = [Branch("vision", image="features")] if self.vision else []
        found += [Branch("language")] if self.language else []
        return found if self.gamma else []

    def probes(self, family: Any) -> list[Probe]:
        if not (self.vision and self.gamma):
            return []
        layer = min(family.full_attention_vision_layers, key=lambda i: (abs(i - family.feature_layer), i))
        of_map = partial(_weights_of_patches, self.vision, self.seed, family.has_cls)
        probes = [Probe("vision_map", layer, of_map=of_map, label=self.vision)]
        return [*probes, Probe("vision_states", layer)] if family.projects_patches else probes

    def branch_layers(self, family: Any) -> Sequence[int]:
        if not (self.language and self.gamma):
            return ()
        return range(family.num_layers) if self.layers is None else self.layers

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        gamma = 0.0 if self.first_token_only and step else self.gamma
        return [1 + gamma * len(others)] + [-gamma] * len(others)

    def transform_features(self, features: tuple[Tensor, ...], branch: Branch, image: ImageView) -> tuple[Tensor, ...]:
        weight, *states = image.readings.values()
        weight = weight[:, None].to(features[0].device)
        seen = ~weight.isnan()
        weight = weight.masked_fill(~seen, 1)
        if states:
            parameter = next(image.family.projector.parameters())
            patches = (states[0].to(weight.device) * weight).nan_to_num().to(parameter.dtype)
            changed = image.family.project(patches)
            return (torch.where(seen, changed.to(features[0].dtype), features[0]),)
        return tuple(tensor * weight.to(tensor) for tensor in features)

    def attend(self, call: BranchAttention, branch: Branch) -> Tensor | None:
        if branch.name != "language" or self.language is None:
            return None
        return attend_otherwise(call, self.language, self.renormalize, self.seed)


def _square_crops(family: Any) -> bool:
    size = getattr(family.vision.config, "image_size", None)
    return isinstance(size, int) or (isinstance(size, (list, tuple)) and len(set(size)) == 1)
