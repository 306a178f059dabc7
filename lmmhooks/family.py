"""
Model families: where a multimodal model keeps its parts, and what its visual tokens show.

`resolve` turns a loaded model into a `Family`, one instance per model. The base class answers every question from the
model itself; a module in `lmmhooks.families` overrides only what deviates. Anything specific to one architecture lives
there and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import families
from .errors import ModelError, closest
from .head import LanguageHead
from .inputs import ModelInputs
from .parts import LayerParts
from .placing import Placing
from .smaller import SmallerImages
from .usable import unusable, uses_attention_interface
from .vision import ImageTokens, VisionInputs

__all__ = ["Family", "VisionInputs", "resolve", "supported", "uses_attention_interface"]

#: Names under which the multimodal modules of transformers keep their vision tower, most common first.
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_encoder")
_PROJECTORS = ("multi_modal_projector", "mm_projector", "connector", "aligner", "projector")


class Family(ModelInputs, LayerParts, LanguageHead, SmallerImages, Placing):
    """
    The parts of one loaded model, and the geometry of its visual tokens.

    Construct it through `resolve`, which checks first that the model can be used at all.

    Parameters
    ----------
    model
        A transformers model with a language head (``...ForConditionalGeneration``).

    Attributes
    ----------
    name
        Model type of the configuration, for example ``"llava"``.
    model, core, text_model
        The model, its multimodal module (the one that owns ``get_image_features``), and its decoder.
    text_config
        Configuration of the decoder.
    layers, norm, lm_head
        Decoder layers, the norm after them, and the output head.
    vision, vision_layers, projector
        Vision tower, its transformer layers, and the module between tower and decoder (None if part of the tower).
    image_token_id, video_token_id
        Placeholder ids in ``input_ids``; the video one is None for models without video.
    has_cls
        The tower puts a CLS token at index 0 of its sequence.
    num_layers, hidden_size, num_heads, num_kv_heads
        Of the decoder.
    mrope
        Positions have temporal, height and width rows.
    deepstack_layers
        Number of first decoder layers after which visual features are added again at visual positions.
    projects_patches
        Every patch becomes one visual token, by itself: features of the tower can be changed and projected again.
    has_tiles
        An image may be seen as several crops (tiles), whose number depends on its size.
    encodes_images_alone
        Features of an image do not depend on how many images the prompt has.
    pixels_per_token
        Side in pixels of the square that a visual token stands for, in models that take images of any size; None where
        images are brought to a size, or tiles of a size, first.
    feature_layer
        0-based vision layer whose output the projector reads; the last one listed where several are concatenated.
    full_attention_vision_layers
        0-based vision layers that attend over a whole crop; the others attend inside windows.
    window_attention
        Some vision layers are windowed, and the tower's token order is a permutation of the raster order.

    Raises
    ------
    ModelError
        A part cannot be found; the text names the part and where it was looked for.
    """

    #: ``config.model_type`` values that this class serves; empty for the generic resolution.
    model_types: ClassVar[tuple[str, ...]] = ()

    projects_patches: ClassVar[bool] = False
    has_tiles: ClassVar[bool] = False
    encodes_images_alone: ClassVar[bool] = True
    pixels_per_token: int | None = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name: str = model.config.model_type
        self.core: Any = self._part("multimodal module", model, "model", with_method="get_image_features")
        self.text_model: Any = self._part("decoder", self.core, "language_model", "text_model")
        self.text_config: Any = self.text_model.config
        self.layers: nn.ModuleList = self._part("decoder layers", self.text_model, "layers")
        self.norm: nn.Module = self._part("final norm", self.text_model, "norm", "final_layernorm")
        self.lm_head: nn.Module = self._part("output head", model, "lm_head")
        self.vision: Any = self._part("vision tower", self.core, *_TOWERS)
        self.vision_layers: nn.ModuleList = self._attention_stack(self.vision)
        self.projector: nn.Module | None = next(
            (getattr(self.core, name) for name in _PROJECTORS if isinstance(getattr(self.core, name, None), nn.Module)),
            None,
        )
        self.image_token_id: int = self._token_id("image")
        self.video_token_id: int | None = getattr(model.config, "video_token_id", None)
        self.has_cls: bool = any(
            name.endswith(("class_embedding", "cls_token")) for name, _ in self.vision.named_parameters()
        )
        self.num_layers: int = len(self.layers)
        self.hidden_size: int = self.text_config.hidden_size
        self.num_heads: int = self.text_config.num_attention_heads
        self.num_kv_heads: int = getattr(self.text_config, "num_key_value_heads", None) or self.num_heads
        self.mrope: bool = hasattr(self.core, "get_rope_index")
        self.deepstack_layers: int = 0
        self.feature_layer: int = self._feature_layer()
        self.full_attention_vision_layers: tuple[int, ...] = tuple(range(len(self.vision_layers)))
        self.window_attention: bool = False
        self._verify()

    @property
    def tokens_per_image(self) -> int | None:
        """Visual tokens of every image, where all images have equally many; None where that depends on the image."""
        return None

    # -- geometry --------------------------------------------------------------------------------------------

    def token_counts(self, vision: VisionInputs) -> list[int]:
        """Visual tokens in the prompt for every feature entry of a call, after any expansion."""
        return vision.lengths()

    def group_entries(self, positions: Sequence[Tensor]) -> list[int]:
        """
        How many consecutive feature entries of a row make up each image.

        Parameters
        ----------
        positions
            Per entry, the sequence positions its features go to (long, CPU, ascending).
        """
        return [1] * len(positions)

    def crops_of(self, vision: VisionInputs) -> list[int]:
        """Crops (tiles, frames) that the tower sees of every image of a call, in tower order."""
        return list(vision.entries_per_image or [1] * vision.num_entries)

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens:
        """
        What the visual tokens of one image show.

        Parameters
        ----------
        vision
            The encoder call.
        source
            Ordinal of the image in that call, before any expansion.
        num_tokens
            Its visual tokens in the prompt.

        Raises
        ------
        PromptError
            The call's image sizes do not give that many tokens.
        """
        side = self._grid_side(num_tokens)
        if side is None:
            return ImageTokens.unknown(num_tokens)
        return ImageTokens.raster([(side, side)])

    def tower_to_tokens(self, per_patch: Sequence[Tensor], vision: VisionInputs) -> list[Tensor]:
        """
        Features of vision-tower positions (scores, states, keys) as features of visual tokens.

        Where a token is made of several patches it gets their mean. Call it after `lmmhooks.layout.build_layout`, from
        which some families learn how tiles group into images.

        Parameters
        ----------
        per_patch
            Features per patch in tower order, concatenated along the first dimension: for towers that see crops
            ``[crops, patches, C]`` without CLS, for towers that see packed patches ``[1, patches, C]``.
        vision
            The encoder call, before any expansion.

        Returns
        -------
        list of Tensor
            One float tensor ``[tokens, C]`` per image, in sequence order; NaN for tokens that show no place in it.

        Raises
        ------
        ModelError
            The family cannot relate patches to tokens.
        """
        features = torch.cat(list(per_patch))
        out = []
        for image, entry in zip(features.split(self.crops_of(vision)), self._entries(vision), strict=True):
            flat = image.flatten(0, 1)
            if len(flat) != entry:
                raise ModelError(
                    f"how model type {self.name!r} turns {len(flat)} patches into {entry} visual tokens is not known; "
                    f"readings of the vision tower work on {_listed(supported())}"
                )
            out.append(flat)
        return out

    def project(self, features: Tensor) -> Tensor:
        """
        Features of the tower as embeddings of the decoder.

        Parameters
        ----------
        features
            ``[..., C]`` as the projector takes them; `projects_patches` must hold.

        Returns
        -------
        Tensor
            ``[..., D]``.
        """
        if self.projector is None or not self.projects_patches:
            raise ModelError(f"{type(self.model).__name__} does not turn single patches into tokens")
        return self.projector(features)

    def describe(self) -> dict[str, Any]:
        """Facts about the model that fit into JSON."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "resolved_by": type(self).__name__,
            "decoder_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "vision_layers": len(self.vision_layers),
            "feature_layer": self.feature_layer,
            "full_attention_vision_layers": list(self.full_attention_vision_layers),
            "window_attention": self.window_attention,
            "cls": self.has_cls,
            "mrope": self.mrope,
            "deepstack_layers": self.deepstack_layers,
            "video": self.video_token_id is not None,
        }

    # -- for subclasses --------------------------------------------------------------------------------------

    def _entries(self, vision: VisionInputs) -> list[int]:
        """Tokens of every image of a call, before any expansion."""
        lengths = self.token_counts(vision)
        copies = len(lengths) // vision.num_entries if vision.num_entries else 1
        if copies > 1:
            raise ModelError("readings of the vision tower were asked for after the features were expanded for beams")
        groups = vision.entries_per_image or [1] * vision.num_entries
        out, start = [], 0
        for size in groups:
            out.append(sum(lengths[start : start + size]))
            start += size
        return out

    def _part(self, what: str, owner: nn.Module, *names: str, with_method: str | None = None) -> Any:
        for name in names:
            part = getattr(owner, name, None)
            if isinstance(part, nn.Module) and (with_method is None or hasattr(part, with_method)):
                return part
        wanted = " or ".join(names) + (f" with {with_method}()" if with_method else "")
        raise ModelError(
            f"{type(self.model).__name__} has no {what}: {type(owner).__name__} has no {wanted}; "
            f"supported model types are {_listed(supported())}"
        )

    def _attention_stack(self, tower: nn.Module) -> nn.ModuleList:
        """The longest list of layers in the tower that hold attention."""
        best: nn.ModuleList | None = None
        for module in tower.modules():
            if (
                isinstance(module, nn.ModuleList)
                and len(module) > len(best or ())
                and all(any(type(c).__name__.endswith("Attention") for c in layer.children()) for layer in module)
            ):
                best = module
        if best is None:
            raise ModelError(
                f"vision tower {type(tower).__name__} has no list of layers with attention; supported model types are "
                f"{_listed(supported())}"
            )
        return best

    def _token_id(self, modality: str) -> int:
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            value = getattr(self.model.config, name, None)
            if isinstance(value, int):
                return value
        raise ModelError(
            f"configuration of {type(self.model).__name__} has no {modality}_token_id, so its decoder has no visual "
            f"tokens; supported model types are {_listed(supported())}"
        )

    def _feature_layer(self) -> int:
        chosen = getattr(self.model.config, "vision_feature_layer", None)
        depth = len(self.vision_layers)
        if chosen is None:
            return depth - 1
        index = chosen if isinstance(chosen, int) else chosen[-1]
        # `hidden_states` has depth + 1 entries, the first being the embeddings: entry i is the output of layer i - 1.
        return (index if index >= 0 else depth + 1 + index) - 1

    def _grid_side(self, num_tokens: int) -> int | None:
        """
        Side of the square token grid of one crop, or None if it cannot be told.

        Only towers of a fixed resolution are answered for: the side then divides the tower's patch grid, so that
        a token count which merely happens to be a square is not mistaken for a square image.
        """
        config = self.vision.config
        size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int):
            return None
        side = math.isqrt(num_tokens)
        return side if side and side**2 == num_tokens and (size // patch) % side == 0 else None

    def _verify(self) -> None:
        """Refuse what the engines cannot work with; every decoder layer must hold reachable attention."""
        for index, layer in enumerate(self.layers):
            try:
                attention = self.attention_of(layer)
            except ModelError as error:
                raise ModelError(f"{type(self.model).__name__}, decoder layer {index}: {error}") from None
            if not uses_attention_interface(attention):
                raise ModelError(
                    f"{type(attention).__name__} of {type(self.model).__name__} does not use transformers' "
                    f"AttentionInterface, so nothing can reach it; supported model types are {_listed(supported())}"
                )


def supported() -> dict[str, type[Family]]:
    """Model types with a family of their own, sorted: those shipped here and those of installed plug-ins that load."""
    return families.discover(Family)[0]


def resolve(model: Any) -> Family:
    """
    The family of a loaded model.

    The model type selects a class from `lmmhooks.families` or from the entry-point group of that name; any other model
    is resolved generically and verified part by part.

    Raises
    ------
    ModelError
        One line that names what is missing: not a transformers model, remote code, no visual tokens in the decoder
        (text-only, encoder-decoder, cross-attention, Q-Former), or attention that cannot be reached.
    """
    from transformers import PreTrainedModel

    known, broken = families.discover(Family)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"expected a transformers model, got {type(model).__name__}; load one with lmmhooks.load(...) or "
            f"AutoModelForImageTextToText.from_pretrained(...), and merge adapters into it first"
        )
    name = model.config.model_type
    if problem := unusable(model):
        raise ModelError(
            f"{type(model).__name__} (model type {name!r}) cannot be used: {problem}; supported model types are "
            f"{_listed(known)}"
        )
    if name in known:
        return known[name](model)
    try:
        return Family(model)
    except ModelError as error:
        hints = "".join(f"; plug-in {plugin!r} failed to load: {reason}" for plugin, reason in broken.items())
        raise ModelError(f"{error}{closest(name, known)}{hints}") from None


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
