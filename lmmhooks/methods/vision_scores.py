"""What stands for "salient" in a vision tower: class-token attention, or attention received where there is none."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method
from lmmhooks.methods.probe import Probe

__all__ = ["mean_key", "saliency_probe"]


def saliency_probe(
    method: Method,
    family: Any,
    layer: int | None,
    *,
    preferred: int | None = None,
    name: str = "layer",
    signal: Literal["vision_cls", "vision_cls_wide", "vision_global"] = "vision_cls",
) -> Probe:
    """
    The probe that ranks patches of this model.

    Parameters
    ----------
    method
        Who asks, for the error.
    family
        The model family.
    layer
        Vision layer, 0-based. None: the preferred one; without a class token, the full-attention layer nearest to it,
        the earlier one of two.
    preferred
        Layer that the method was published with; None: `Family.feature_layer`.
    name
        The method's setting that ``layer`` comes from, for the error.
    signal
        What is read of towers with a class token; of the others it is always the attention a patch receives.

    Raises
    ------
    MethodError
        The tower has no such layer, or has no class token and attends inside windows there.
    """
    depth, whole = len(family.vision_layers), family.full_attention_vision_layers
    if layer is not None and not 0 <= layer < depth:
        raise MethodError(f"{method.id}: {name}={layer} is not in the vision tower, which has layers 0 to {depth - 1}")
    preferred = family.feature_layer if preferred is None else preferred
    if family.has_cls:
        return Probe(signal, preferred if layer is None else layer)
    if layer is None:
        layer = min(whole, key=lambda i: (abs(i - preferred), i))
    if layer not in whole:
        listed = ", ".join(map(str, whole))
        raise MethodError(f"{method.id}: vision layer {layer} attends inside windows; layers that see all: {listed}")
    return Probe("vision_received", layer)


def mean_key(keys: Tensor, family: Any, layer: int) -> Tensor:
    """
    Keys of a vision layer, mean over heads.

    Parameters
    ----------
    keys
        ``[..., H d]`` as ``"vision_keys"`` reads them.
    family
        The model family.
    layer
        Vision layer, 0-based.

    Returns
    -------
    Tensor
        ``[..., d]``.
    """
    heads: int = family.attention_of(family.vision_layers[layer]).num_heads
    return keys.unflatten(-1, (heads, -1)).mean(dim=-2)
