"""
Imbalanced-attention fix: boost the image tokens that the vision tower itself finds salient, early and late, apart.

PAI lifts all image tokens alike. Here "local" tokens, to which the class token attends most in the first vision layer,
and "global" ones, outliers of its attention in the last layer but one, get strengths of their own; the other image
tokens stay as they are. Boost and guidance are PAI's.

Differs from the release, which is for batches of one: groups are made per image, over all its crops. The paper's
modulation per head and its spatial stream are in neither release nor here (UNVERIFIED). Towers without a class token
are read by the mean attention a patch receives, our extension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lmmhooks.methods.attention.base import AttentionContext
from lmmhooks.methods.attention.boosting import GuidedBoost
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.vision_scores import saliency_probe

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.prompt import PromptContext

__all__ = ["FixImbalance", "salient_groups"]


def salient_groups(early: Tensor, late: Tensor, local_ratio: float) -> tuple[Tensor, Tensor]:
    """
    The two groups of one image.

    Parameters
    ----------
    early, late
        ``[V]`` float32 attention on its tokens in two vision layers; NaN for tokens that show no place in the image,
        which belong to no group and do not count.
    local_ratio
        Share of the tokens that are candidates for the local group, in [0, 1].

    Returns
    -------
    tuple
        Local and global tokens, bool ``[V]``, disjoint. Costs one host synchronisation.
    """
    shown = ~early.isnan()
    num_local = int(int(shown.sum()) * local_ratio)
    order = early.masked_fill(~shown, -torch.inf).argsort(descending=True, stable=True)
    local = torch.zeros_like(shown).index_fill_(0, order[:num_local], True)
    low, high = late.nanquantile(late.new_tensor([0.25, 0.75]))
    # The release counts the outliers and takes as many of the largest, which are the outliers.
    outliers = late > high + 1.5 * (high - low)
    return local & ~outliers, outliers


@dataclass(frozen=True)
class FixImbalance(GuidedBoost):
    """Boost of two groups of image tokens (see the module docstring)."""

    id: ClassVar[str] = "fix-imbalance"
    paper: ClassVar[str] = (
        "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model, "
        "arXiv 2501.12206"
    )
    code: ClassVar[str] = "https://github.com/hasanar1f/llava-hallunication-fix"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released_cli": {"gamma": 2.0, "compat": "release"},
        "released_script": {"alpha": 0.9, "compat": "release"},
        # The setting most of the shipped outputs were made with.
        "released_outputs": {"beta": 0.4, "compat": "release"},
    }

    alpha: float = setting(
        0.7, help="Boost of local tokens, in [0, 1]; above 1 negative logits would change their order (released: 0.7)."
    )
    beta: float = setting(0.3, help="Boost of global tokens, in [0, 1] (released command line: 0.3; outputs: 0.4).")
    local_ratio: float = setting(
        0.25, help="Share of an image's tokens that are candidates for the local group, in [0, 1] (released: 0.25)."
    )
    local_layer: int | None = setting(
        None,
        help="Vision layer that tells local tokens, 0-based. None: the first (released). Without a class token: "
        "received attention, in the nearest layer that sees the whole image (UNVERIFIED).",
    )
    global_layer: int | None = setting(
        None,
        help="Vision layer that tells global tokens, 0-based. None: the last but one (released). Without a class "
        "token: as for local_layer (UNVERIFIED).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "local_ratio"):
            self._require(0 <= getattr(self, name) <= 1, name, "in [0, 1]")

    def check(self, family: Any) -> None:
        super().check(family)
        self.probes(family)

    @property
    def boosts(self) -> bool:
        return self.beta > 0 or (self.alpha > 0 and self.local_ratio > 0)

    def probes(self, family: Any) -> Sequence[Probe]:
        late = max(len(family.vision_layers) - 2, 0)
        return (
            saliency_probe(self, family, self.local_layer, preferred=0, name="local_layer"),
            saliency_probe(self, family, self.global_layer, preferred=late, name="global_layer"),
        )

    def prepare(self, prompt: PromptContext) -> None:
        early, late = (prompt.read(probe) for probe in self.probes(prompt.family))
        strength = torch.zeros_like(early)
        for span in prompt.layout.spans:
            if len(span):
                place = span.positions.to(early.device)
                local, outliers = salient_groups(early[span.sample, place], late[span.sample, place], self.local_ratio)
                strength[span.sample, place] = self.alpha * local + self.beta * outliers
        prompt.memory["strength"] = strength

    def strengths(self, context: AttentionContext) -> Tensor:
        return context.localize(context.memory["strength"])
