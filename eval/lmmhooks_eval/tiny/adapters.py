"""What training has to know about each bundled model: pixels, visual tokens, positions. One class per model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmmhooks_eval.tiny.models import CLIP_MEAN, CLIP_STD, VISUAL_TOKENS, build_model
from lmmhooks_eval.tiny.packing import PACKED_ATTENTION, SHORT_ATTENTION, WINDOW_ATTENTION, Packing
from lmmhooks_eval.tiny.tokenizer import build_tokenizer


@dataclass(frozen=True)
class VisualStates:
    """Vision output of a batch.

    Parameters
    ----------
    tokens
        What enters the language model, ``(B, 64, text width)``.
    patches
        The states that the dense heads read, ``(B, 64, vision width)``, row-major over the 8 x 8 grid.
    summaries
        CLS states, ``(B, vision width)`` each; empty for models without CLS.
    """

    tokens: Tensor
    patches: Tensor
    summaries: tuple[Tensor, ...]


class Adapter(ABC):
    """A bundled model in training.

    Parameters
    ----------
    name
        Name of the model.

    Attributes
    ----------
    model, tokenizer
        The unmodified transformers objects.
    patch_width, num_summaries
        Width of `VisualStates.patches` and number of `VisualStates.summaries`.
    """

    patch_width: int
    num_summaries: int

    def __init__(self, name: str) -> None:
        self.tokenizer = build_tokenizer(name)
        self.model = build_model(name, self.tokenizer)
        self.image_token_id = int(self.model.config.image_token_id)

    @property
    @abstractmethod
    def vision(self) -> nn.Module:
        """The vision tower, trained alone in the first stage."""

    @property
    @abstractmethod
    def vision_blocks(self) -> nn.ModuleList:
        """Its transformer blocks, whose matrices Muon trains."""

    @abstractmethod
    def use_training_attention(self) -> None:
        """Point the model's parts at the attention functions of `packing`."""

    @abstractmethod
    def pixel_values(self, images: np.ndarray) -> Tensor:
        """uint8 ``(B, 112, 112, 3)`` -> the model's pixel input, equal to its image processor's output."""

    @abstractmethod
    def see(self, pixels: Tensor) -> VisualStates:
        """Run the vision tower and projector."""

    @abstractmethod
    def positions(self, prefix_ids: Tensor, packing: Packing) -> Tensor:
        """Position ids of one packed row, shaped for the language model with batch size 1."""

    def packed_states(self, ids: Tensor, visual: VisualStates | None, packing: Packing) -> Tensor:
        """Last hidden states of packed rows.

        Parameters
        ----------
        ids
            int64 ``(B, packing.length)``.
        visual
            Vision output, or None for rows without image tokens.

        Returns
        -------
        Tensor
            ``(B, packing.length, text width)``.
        """
        language_model = self.model.model.language_model
        embeddings = language_model.embed_tokens(ids)
        if visual is not None:
            image_at = int((ids[0] == self.image_token_id).nonzero()[0])
            after = image_at + VISUAL_TOKENS
            tokens = visual.tokens.to(embeddings.dtype)
            embeddings = torch.cat([embeddings[:, :image_at], tokens, embeddings[:, after:]], dim=1)
        position_ids = self.positions(ids[0, : packing.prefix], packing)
        output = language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids.expand(*position_ids.shape[:-2], ids.shape[0], -1),
            use_cache=False,
            packing=packing,
        )
        return output.last_hidden_state


class LlavaAdapter(Adapter):
    """tiny-llava: CLIP tower with CLS, penultimate layer, two-layer projector, one-dimensional positions."""

    patch_width = 128
    num_summaries = 2

    @property
    def vision(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.vision_tower.encoder.layers

    def use_training_attention(self) -> None:
        self.model.model.language_model.config._attn_implementation = PACKED_ATTENTION
        self.model.model.vision_tower.config._attn_implementation = SHORT_ATTENTION

    def pixel_values(self, images: np.ndarray) -> Tensor:
        return _normalised(images)

    def see(self, pixels: Tensor) -> VisualStates:
        states = self.vision(pixels, output_hidden_states=True).hidden_states
        patches = states[-2][:, 1:]
        tokens = self.model.model.multi_modal_projector(patches)
        return VisualStates(tokens, patches, (states[-2][:, 0], states[-1][:, 0]))

    def positions(self, prefix_ids: Tensor, packing: Packing) -> Tensor:
        slots = packing.slot_offsets().to(prefix_ids.device) + packing.prefix
        return torch.cat([torch.arange(packing.prefix, device=prefix_ids.device), slots])[None]


class QwenAdapter(Adapter):
    """tiny-qwen: window attention, 2 x 2 patch merging, M-RoPE."""

    patch_width = 192
    num_summaries = 0

    @property
    def vision(self) -> nn.Module:
        return self.model.model.visual

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.visual.blocks

    def use_training_attention(self) -> None:
        self.model.model.language_model.config._attn_implementation = PACKED_ATTENTION
        self.model.model.visual.config._attn_implementation = WINDOW_ATTENTION

    def pixel_values(self, images: np.ndarray) -> Tensor:
        config = self.model.config.vision_config
        merge, patch, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
        pixels = _normalised(images)
        side = pixels.shape[-1] // (merge * patch)
        blocks = pixels.reshape(-1, 3, side, merge, patch, side, merge, patch)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]  # (B, gh, gw, mh, mw, C, 1, p, p)
        blocks = blocks.expand(*blocks.shape[:6], frames, patch, patch)
        return blocks.reshape(-1, 3 * frames * patch * patch)

    def see(self, pixels: Tensor) -> VisualStates:
        config = self.model.config.vision_config
        side = 8 * config.spatial_merge_size
        images = pixels.shape[0] // side**2
        grid = torch.tensor([[1, side, side]], device=pixels.device).expand(images, 3)
        tokens = self.vision(pixels, grid_thw=grid).pooler_output.unflatten(0, (images, VISUAL_TOKENS))
        return VisualStates(tokens, tokens, ())

    def positions(self, prefix_ids: Tensor, packing: Packing) -> Tensor:
        is_image = prefix_ids == self.image_token_id
        if bool(is_image.any()):
            side = 8 * self.model.config.vision_config.spatial_merge_size
            grid = torch.tensor([[1, side, side]], device=prefix_ids.device)
            prefix = self.model.model.get_rope_index(prefix_ids[None], is_image.int()[None], image_grid_thw=grid)[0]
        else:
            prefix = torch.arange(packing.prefix, device=prefix_ids.device).expand(3, 1, -1)
        slots = packing.slot_offsets().to(prefix_ids.device) + prefix.max() + 1
        return torch.cat([prefix, slots.expand(3, 1, -1)], dim=-1)


ADAPTERS: dict[str, type[Adapter]] = {"tiny-llava": LlavaAdapter, "tiny-qwen": QwenAdapter}


def make_adapter(name: str) -> Adapter:
    """Build the adapter of a bundled model with fresh random weights.

    Raises
    ------
    ValueError
        If there is no bundled model of that name.
    """
    if name not in ADAPTERS:
        raise ValueError(f"unknown bundled model {name!r}; choose one of {', '.join(ADAPTERS)}")
    return ADAPTERS[name](name)


def _normalised(images: np.ndarray) -> Tensor:
    scale = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    shift = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
    pixels: Any = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
    return (pixels - shift) / scale
