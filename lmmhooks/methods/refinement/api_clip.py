"""
API with CLIP as the auxiliary model: fade what CLIP finds unrelated to the question.

CLIP's image embedding is a sum of contributions: of every patch through attention to the class token, and of the patch
tokens themselves. Those of one layer, brought through the final norm and the projection and compared with the
embedding of the question, are two maps; together they are the mask.

Follows the released code: the layer's attention is divided over patches, all heads together, its output bias evenly;
the patch tokens are those that leave the layer; the background is black. Only the mask depends on CLIP, so it works
with any answering model. Questions longer than CLIP reads are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.geometry import CellGrid, Geometry
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import Look, LookAgain
from lmmhooks.methods.refinement.operators import fade
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.refinement.softmask import RESAMPLING, placed, smoothed, stretched
from lmmhooks.placing import shown

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ApiClip", "ClipMaps", "contributions", "joined", "load_clip"]


def contributions(block: Any, hidden: Tensor) -> Tensor:
    """
    What each token adds to the class token in the attention of one block.

    Parameters
    ----------
    block
        An encoder layer of CLIP.
    hidden
        Its input ``[N, D]``, class token first.

    Returns
    -------
    Tensor
        ``[N, D]``, whose sum is the output of the attention for the class token.
    """
    attention, normed = block.self_attn, block.layer_norm1(hidden)
    heads, width = attention.num_heads, attention.head_dim
    query = attention.q_proj(normed[:1]).view(heads, width)
    key, value = (project(normed).view(-1, heads, width) for project in (attention.k_proj, attention.v_proj))
    weights = (torch.einsum("hd,nhd->hn", query, key) * width**-0.5).softmax(dim=-1)
    mixed = (weights.T[..., None] * value).flatten(1)
    return mixed @ attention.out_proj.weight.T + attention.out_proj.bias / len(hidden)


def joined(of_class: Tensor, of_patches: Tensor, contrast: float, kernel: int) -> Tensor:
    """
    One mask ``[rows, columns]`` in [0, 1] of CLIP's two maps.

    Parameters
    ----------
    of_class
        How related to the text what a patch adds to the class token is; its contrast is raised.
    of_patches
        How related the patch tokens are; inverted, as in the released code.
    contrast, kernel
        As of `lmmhooks.methods.refinement.softmask.soft_mask`.
    """
    first, second = stretched(of_class.float()), stretched(-of_patches.float())
    if bool((first != first[0, 0]).any()):
        centred = first - first.mean()
        first = smoothed((contrast * (centred / centred.std())).sigmoid(), kernel)
    second = smoothed(second, kernel)
    return stretched(first + second - first * second)


@dataclass(frozen=True, eq=False)
class ClipMaps:
    """A CLIP model with what prepares its inputs."""

    model: Any
    image_processor: Any
    tokenizer: Any

    @torch.no_grad()
    def maps(self, image: Image, text: str, layer: int) -> tuple[Tensor, Tensor]:
        """Relation to a text ``[rows, columns]`` of what patches add to the class token, and of the patch tokens."""
        vision = self.model.vision_model
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        states = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
        norm, last = vision.post_layernorm, states[-1][0, 0]
        # In as many parts the released code divides the mean and the bias of the norm: attention and MLP of all layers
        # but one of them.
        parts = 2 * (len(states) - 1) - 1
        spread = (last.var(unbiased=False) + norm.eps).sqrt()

        def projected(part: Tensor, share: int) -> Tensor:
            normed = norm.weight * (part - last.mean() / share) / spread + norm.bias / share
            return self.model.visual_projection(normed)

        added, patches = contributions(vision.encoder.layers[layer], states[layer][0]), states[layer + 1][0, 1:]
        tokens = self.tokenizer([text], truncation=True, return_tensors="pt")
        wanted = self.model.get_text_features(**tokens)
        wanted = getattr(wanted, "pooler_output", wanted)[0]
        wanted = wanted / wanted.norm() / self.model.visual_projection(norm(last)).norm()
        side = round(len(patches) ** 0.5)
        of_class = projected(added, parts * len(added))[1:] @ wanted
        return of_class.reshape(side, side), (projected(patches, parts) @ wanted).reshape(side, side)


@lru_cache(maxsize=1)
def load_clip(path: str) -> ClipMaps:
    """
    A CLIP model from a folder or the hub, loaded once, on the CPU.

    Raises
    ------
    MethodError
        It cannot be loaded.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(path, dtype=torch.float32).eval()
        return ClipMaps(model, AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MethodError(
            f"api-clip: clip={path!r} cannot be loaded ({reason}); give the folder or hub id of a CLIP model"
        ) from None


@dataclass(frozen=True)
class ApiClip(LookAgain):
    """Fade what CLIP finds unrelated to the question."""

    id: ClassVar[str] = "api-clip"
    paper: ClassVar[str] = "Attention Prompting on Image for Large Vision-Language Models, ECCV 2024, arXiv:2409.17143"
    code: ClassVar[str] = "https://github.com/yu-rp/apiprompting"

    clip: str = setting("openai/clip-vit-large-patch14-336", help="Folder or hub id of the CLIP model.")
    show: str = setting("refined", help="Pictures of the second answer: 'refined' (released), or 'both'.")
    layer: int = setting(
        -2, help="Layer of CLIP's image encoder, 0-based, negative from the last (released: 22 of 24)."
    )
    contrast: float = setting(5.0, help="Factor before the sigmoid that raises the contrast of the map, above 0.")
    kernel: int = setting(3, help="Patches per side over which the mask is smoothed, odd; 1: not.")
    resampling: str = setting("lanczos", help="How the mask is enlarged: 'lanczos' or 'bicubic'.")
    background: float = setting(0.0, help="Grey level of what is faded out, 0 to 255 (released: 0).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.contrast > 0, "contrast", "above 0")
        self._require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "odd, 1 or more")
        self._require(self.resampling in RESAMPLING, "resampling", "'lanczos' or 'bicubic'")
        self._require(0 <= self.background <= 255, "background", "in [0, 255]")

    def check(self, family: Any) -> None:
        depth = load_clip(self.clip).model.config.vision_config.num_hidden_layers
        self._require(-depth <= self.layer < depth, "layer", f"a layer of this CLIP model, {-depth} to {depth - 1}")

    def saliency(self, look: Look) -> Saliency:
        clip = load_clip(self.clip)
        config = clip.model.config.vision_config
        maps = clip.maps(look.image, look.prompt, self.layer % config.num_hidden_layers)
        mask = joined(*maps, self.contrast, self.kernel)
        width, height = look.image.size
        box = (0.0, 0.0, float(width), float(height))
        if self.geometry == "true":
            box = shown(clip.image_processor, look.image.size, config.patch_size)
        grid = CellGrid(torch.arange(mask.numel()).reshape(mask.shape), box, "image")
        return Saliency(mask.flatten(), Geometry(look.image.size, mask.numel(), (grid,)))

    def refined(self, image: Image, saliency: Saliency) -> Image:
        grid, box = saliency.grid()
        return fade(image, placed(grid.float(), box, image.size, self.resampling), self.background)
