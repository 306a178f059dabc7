"""Multiply-adds of the vision tower and the projector, which reductions inside the decoder do not touch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["VisionShape", "projector_macs", "vision_macs"]


@dataclass(frozen=True)
class _Trait:
    """What a vision config does not say about its tower."""

    class_tokens: int
    gated_ffn: bool


_TRAITS = {
    "clip_vision_model": _Trait(class_tokens=1, gated_ffn=False),
    "internvl_vision": _Trait(class_tokens=1, gated_ffn=False),
    "qwen2_5_vl": _Trait(class_tokens=0, gated_ffn=True),
    "qwen2_5_vl_vision": _Trait(class_tokens=0, gated_ffn=True),
    "qwen2_vl": _Trait(class_tokens=0, gated_ffn=False),
    "qwen2_vl_vision": _Trait(class_tokens=0, gated_ffn=False),
    "qwen3_vl": _Trait(class_tokens=0, gated_ffn=False),
    "qwen3_vl_vision": _Trait(class_tokens=0, gated_ffn=False),
    "siglip_vision_model": _Trait(class_tokens=0, gated_ffn=False),
}


@dataclass(frozen=True)
class VisionShape:
    """
    Sizes of a vision transformer that its cost depends on.

    Parameters
    ----------
    layers
        Transformer layers that run.
    width
        Width of the hidden states.
    ffn_width
        Inner width of the feed-forward part.
    patch_inputs
        Numbers that one patch embedding reads: channels x patch height x patch width (x frames for video towers).
    class_tokens
        Tokens beside the patches (1 for a CLS token).
    gated_ffn
        Whether the feed-forward part has three matrices or two.
    window_patches
        Patches per attention window; 0 means that every layer attends to everything.
    full_layers
        With windows, the number of layers that attend to everything.
    """

    layers: int
    width: int
    ffn_width: int
    patch_inputs: int
    class_tokens: int = 0
    gated_ffn: bool = False
    window_patches: int = 0
    full_layers: int = 0

    @classmethod
    def from_config(cls, config: Any) -> VisionShape:
        """
        Read the sizes from a transformers vision config.

        Parameters
        ----------
        config
            The vision config of a supported family.

        Returns
        -------
        VisionShape

        Raises
        ------
        ValueError
            A vision model whose structure is not known here; the message lists the known ones.
        """
        kind = getattr(config, "model_type", type(config).__name__)
        if kind not in _TRAITS:
            raise ValueError(
                f"vision model {kind!r} has no entry in the cost model: known are {', '.join(sorted(_TRAITS))}; "
                "construct VisionShape(...) from the sizes directly"
            )
        trait = _TRAITS[kind]
        # Qwen2-VL calls the tower's width `embed_dim` and the decoder's width, to which it projects, `hidden_size`.
        width = getattr(config, "embed_dim", None) or config.hidden_size
        layers = getattr(config, "depth", None) or config.num_hidden_layers
        ffn_width = getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio)
        patch = config.patch_size if isinstance(config.patch_size, (list, tuple)) else [config.patch_size] * 2
        channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
        frames = getattr(config, "temporal_patch_size", 1)
        frames = frames[0] if isinstance(frames, (list, tuple)) else frames
        window = getattr(config, "window_size", None) or 0
        full = getattr(config, "fullatt_block_indexes", None) or ()
        return cls(
            layers=layers,
            width=width,
            ffn_width=ffn_width,
            patch_inputs=channels * patch[0] * patch[1] * frames,
            class_tokens=trait.class_tokens,
            gated_ffn=trait.gated_ffn,
            window_patches=(window // patch[0]) ** 2 if full else 0,
            full_layers=len(full),
        )


def vision_macs(shape: VisionShape, patches: int, layers: int | None = None) -> int:
    """
    MACs of a vision tower for one crop, image or frame; projector not included.

    Parameters
    ----------
    shape
        The tower.
    patches
        Patches, before any merging.
    layers
        Layers that count; all by default. LLaVA takes the last but one hidden state, so 23 of CLIP-L's 24 are used.

    Returns
    -------
    int
        Multiply-adds, bidirectional attention counted as ``n**2`` pairs (exact).
    """
    layers = shape.layers if layers is None else layers
    tokens = patches + shape.class_tokens
    linear = 4 * shape.width**2 + (3 if shape.gated_ffn else 2) * shape.width * shape.ffn_width
    if shape.window_patches:
        full = min(shape.full_layers, layers)
        pairs = full * tokens**2 + (layers - full) * tokens * min(shape.window_patches, tokens)
    else:
        pairs = layers * tokens**2
    return patches * shape.patch_inputs * shape.width + layers * tokens * linear + 2 * shape.width * pairs


def projector_macs(tokens: int, widths: tuple[int, ...]) -> int:
    """
    MACs of a multi-layer perceptron between vision tower and decoder.

    Parameters
    ----------
    tokens
        Tokens that pass it.
    widths
        Widths from input to output: ``(1024, 4096, 4096)`` for LLaVA-1.5-7B; for Qwen2.5-VL-7B's patch merger,
        which joins four patches, ``(5120, 5120, 3584)``.

    Returns
    -------
    int
        Multiply-adds.
    """
    return tokens * sum(before * after for before, after in pairwise(widths))
