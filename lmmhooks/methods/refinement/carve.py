"""
CARVE (contrastive attention refinement): what the question looks at, beyond what a neutral instruction looks at.

Attention over the image is divided by that under "write a general description"; what the picture attracts anyway drops
out. Ratios of several layers and steps are fused, the best regions are kept, everything else is painted black, and the
bounding box of the regions, enlarged, is a second picture beside the image.

Follows the released code where the paper differs: the answer sees both pictures (``show='refined'`` is the paper's
algorithm), at least `num_regions` are kept (``region_rule='at_most'`` is the paper's, for which it finds p = 0.4 and
K = 2 best), steps are paired by index and weighted by t + 1 (``steps='last'`` is the paper's best setting, which the
code has not). The code takes maps of some sizes for square ones whatever the grid is and stretches them over the whole
image; here cells lie where the model sees them (``geometry='official'`` stretches).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image as images
from scipy import ndimage
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import NEUTRAL, SHORT_ANSWER, Look, LookAgain, layers_that_exist, neutral_prompt
from lmmhooks.methods.refinement.operators import black
from lmmhooks.methods.refinement.regions import best_regions, box_of, number_kept, top_share
from lmmhooks.methods.refinement.saliency import Saliency

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Carve", "best_regions", "contrast", "enlarged", "top_share"]


def contrast(question: Tensor, neutral: Tensor, regulariser: float) -> Tensor:
    """
    Attention of a question over that of a neutral instruction, steps and layers fused.

    Parameters
    ----------
    question, neutral
        ``[T, L, n]`` head means; the longer one loses its last steps.
    regulariser
        Added to the neutral attention.

    Returns
    -------
    Tensor
        ``[n]`` float64: ratios summed over layers, and over steps with weight t + 1.
    """
    steps = min(len(question), len(neutral))
    ratios = question[:steps].double() / (neutral[:steps].double() + regulariser)
    weights = torch.arange(1, steps + 1, dtype=torch.float64)
    return (ratios.sum(dim=1) * weights[:, None]).sum(dim=0)


def enlarged(image: Image, mask: np.ndarray) -> Image:
    """
    The box of a mask cut from an image that is black elsewhere, enlarged until it covers the image's size.

    Parameters
    ----------
    image
        RGB.
    mask
        Bool ``[H, W]`` of the same size; where it is empty, the image comes back.
    """
    if (box := box_of(mask)) is None:
        return image
    cut = black(image, mask).crop(box)
    scale = max(image.width / cut.width, image.height / cut.height)
    return cut.resize((int(cut.width * scale), int(cut.height * scale)), images.Resampling.LANCZOS)


@dataclass(frozen=True)
class Carve(LookAgain):
    """Show the regions a question looks at, enlarged on black, beside the image."""

    id: ClassVar[str] = "carve"
    paper: ClassVar[str] = (
        "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning, ECCV 2026, arXiv:2509.06461"
    )
    code: ClassVar[str] = "https://github.com/YuyaoGe/CARVE"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "v1": {"steps": "first", "regions": "outliers"},
        "v2": {"steps": "first", "regions": "area"},
        "v3": {"steps": "first"},
        "v4": {},
        "paper": {"steps": "last", "show": "refined", "region_rule": "at_most", "share": 0.4, "num_regions": 2},
    }

    read_layers: tuple[int, ...] = setting(
        (20, 21, 22, 23, 24, 25), help="Decoder layers that are fused, 0-based; those a model has not are left out."
    )
    steps: str = setting("all", help="Tokens whose attention is read: 'all', with weight t + 1, 'first' or 'last'.")
    regulariser: float = setting(1e-8, help="Added to the neutral attention, 0 or more.")
    share: float = setting(0.2, help="Share of pixels kept by the threshold, in (0, 1].")
    num_regions: int = setting(3, help="Regions kept, 1 or more.")
    region_rule: str = setting(
        "at_least", help="'at_least': that many or `share` of the regions, the larger (code); 'at_most' (paper)."
    )
    regions: str = setting(
        "attention", help="Which regions are best: 'attention' sum, 'area', or 'outliers', all but specks."
    )
    outlier_percent: float = setting(0.1, help="With 'outliers': smallest region, in percent of the kept pixels, 0+.")
    neutral: str = setting(NEUTRAL, help="The neutral instruction.")
    suffix: str = setting(SHORT_ANSWER, help="Put behind it where the question ends with it; '' never.")
    max_new_tokens: int = setting(32, help="Longest answer that is read, in tokens, 1 or more.")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "read_layers", tuple(self.read_layers))
        self._require(len(self.read_layers) > 0 and min(self.read_layers) >= 0, "read_layers", "layers, 0 or more each")
        self._require(self.steps in ("all", "first", "last"), "steps", "'all', 'first' or 'last'")
        self._require(self.regulariser >= 0, "regulariser", "0 or more")
        self._require(0 < self.share <= 1, "share", "in (0, 1]")
        self._require(self.num_regions >= 1, "num_regions", "1 or more")
        self._require(self.region_rule in ("at_least", "at_most"), "region_rule", "'at_least' or 'at_most'")
        self._require(self.regions in ("attention", "area", "outliers"), "regions", "'attention', 'area' or 'outliers'")
        self._require(self.outlier_percent >= 0, "outlier_percent", "0 or more")
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")

    def check(self, family: Any) -> None:
        if not self.layers(family):
            raise MethodError(
                f"carve: read_layers={self.read_layers} are none of this model's {family.num_layers} decoder layers; "
                "name some that it has (the paper's, 20 to 25 of 28 to 40, lie between half and nine tenths of depth)"
            )

    def layers(self, family: Any) -> tuple[int, ...]:
        return layers_that_exist(self.read_layers, family)

    def saliency(self, look: Look) -> Saliency:
        length = 1 if self.steps == "first" else self.max_new_tokens
        question = look.watch(look.prompt, max_new_tokens=length).rows.mean(dim=2)
        neutral = self._neutral(look, length if self.steps == "last" else len(question))
        if self.steps == "last":
            question, neutral = question[-1:], neutral[-1:]
        return self._placed(look, contrast(question, neutral, self.regulariser))

    def _neutral(self, look: Look, length: int) -> Tensor:
        """Head means ``[T, L, n]`` under the neutral instruction; read once per image, anew only for more steps."""
        prompt = neutral_prompt(look.prompt, self.neutral, self.suffix)
        asked, rows = look.memory.get(prompt, (0, torch.empty(0)))
        if asked < length:
            # What stopped before it had to will not go on.
            rows = look.watch(prompt, max_new_tokens=length).rows.mean(dim=2)
            look.memory[prompt] = (length if len(rows) == length else self.max_new_tokens), rows
        return rows

    def refined(self, image: Image, saliency: Saliency) -> Image:
        plane = saliency.plane()
        mask = top_share(plane, self.share)
        if self.regions == "outliers":
            labels, _ = ndimage.label(mask)
            area = np.bincount(labels.ravel())
            mask &= area[labels] >= int(mask.sum() * self.outlier_percent / 100)
            return enlarged(image, mask)
        count = self.num_regions
        if self.region_rule == "at_least":
            count = number_kept(mask, self.num_regions, self.share)
        return enlarged(image, best_regions(mask, plane, count, by_area=self.regions == "area"))
