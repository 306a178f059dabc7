"""Hidden states of the unpatched model on inputs of the caller's choice: what steering directions are made of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmmhooks.compat import pixels_argument
from lmmhooks.engines.attach import Attachments
from lmmhooks.vision import VisionInputs

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["last_states", "mask_patches", "masked", "vision_states"]


def last_states(runtime: Runtime, inputs: Mapping[str, Any]) -> Tensor:
    """
    States of the decoder at the last position of every row.

    Parameters
    ----------
    runtime
        Of the model; its patches are suspended meanwhile.
    inputs
        Of ``model(...)``, padded on the left.

    Returns
    -------
    Tensor
        ``[B, L + 1, D]`` float32 on the CPU: what the first layer is given, then the output of every layer, the last
        one before the final norm.
    """
    with runtime.suspended() as attachments, torch.inference_mode():
        # Float32 copies on the CPU: the state of one position must not keep the whole sequence of every layer alive.
        states = _record(runtime.family.layers, attachments, lambda x: x[:, -1].float().cpu())
        runtime.family.model(**inputs, use_cache=False)
    return torch.stack(states, dim=1)


def vision_states(runtime: Runtime, inputs: Mapping[str, Any]) -> Tensor:
    """
    States of the vision tower, mean over all crops and images of the inputs.

    Parameters
    ----------
    runtime
        Of the model; its patches are suspended meanwhile.
    inputs
        As the processor returns them; of those, what the image encoder takes is used.

    Returns
    -------
    Tensor
        ``[L + 1, T, D]`` float32 on the CPU: what the first layer is given, then the output of every layer. ``T`` is
        the tokens of a crop, CLS included, or 1 for towers that see packed patches, over which the mean is taken.
    """

    def mean(x: Tensor) -> Tensor:
        x = x.float()
        return (x.mean(dim=0, keepdim=True) if x.dim() == 2 else x.mean(dim=0)).cpu()

    arguments = _encoder_arguments(runtime, inputs)
    with runtime.suspended() as attachments, torch.inference_mode():
        states = _record(runtime.family.vision_layers, attachments, mean)
        runtime.family.core.get_image_features(**arguments)
    return torch.stack(states)


def masked(runtime: Runtime, inputs: Mapping[str, Any], ratio: float, generator: torch.Generator) -> dict[str, Any]:
    """
    The inputs with most patches of every image hidden.

    Parameters
    ----------
    runtime
        Of the model.
    inputs
        As the processor returns them.
    ratio
        Share of the patches of each crop that is replaced by the crop's mean colour, in [0, 1].
    generator
        Draws the patches, on the CPU.
    """
    arguments = _encoder_arguments(runtime, inputs)
    vision = VisionInputs("image", arguments, BaseModelOutputWithPooling(pooler_output=[]))
    patch = getattr(runtime.family.vision.config, "patch_size", 14)
    images = [
        torch.stack([mask_patches(crop, patch, ratio, generator) for crop in image])
        for image in runtime.family.unpack_pixels(vision)
    ]
    return {**inputs, vision.pixels_name: runtime.family.pack_pixels(images, vision)}


def mask_patches(image: Tensor, patch: int | Sequence[int], ratio: float, generator: torch.Generator) -> Tensor:
    """
    Replace random patches of an image ``[C, H, W]`` by its mean per channel.

    Parameters
    ----------
    patch
        Side of a patch in pixels, or height and width.
    ratio
        Share of patches that is replaced, rounded down to whole patches.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = image.shape[1] // height, image.shape[2] // width
    hidden = torch.zeros(rows * columns, dtype=torch.bool)
    hidden[torch.randperm(rows * columns, generator=generator)[: int(ratio * rows * columns)]] = True
    grid = hidden.view(rows, columns).repeat_interleave(height, 0).repeat_interleave(width, 1)
    # What is left of an image that is no whole number of patches stays.
    cover = torch.zeros(image.shape[1:], dtype=torch.bool)
    cover[: grid.shape[0], : grid.shape[1]] = grid
    colour = image.float().mean(dim=(1, 2), keepdim=True).to(image)
    return torch.where(cover.to(image.device), colour, image)


def _record(layers: nn.ModuleList, attachments: Attachments, keep: Any) -> list[Tensor]:
    """A list that fills with what the first layer is given and every layer returns."""
    states: list[Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        states.append(keep(args[0] if args else kwargs["hidden_states"]))

    def leave(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        states.append(keep(output[0] if isinstance(output, tuple) else output))

    attachments.pre_hook(layers[0], enter, "input of layer 0")
    for index, layer in enumerate(layers):
        attachments.hook(layer, leave, f"output of layer {index}")
    return states


def _encoder_arguments(runtime: Runtime, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(runtime.family.core.get_image_features).parameters
    return {name: value for name, value in inputs.items() if name in {*parameters, pixels_argument("image", inputs)}}
