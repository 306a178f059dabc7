"""Attention that visual tokens receive in every layer of the unpatched model: what pruning recipes are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.engines.attention import AttentionEngine
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.errors import PromptError
from lmmhooks.methods.reduction.fitprune import received_by_side

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit
    from lmmhooks.engines.runtime import Runtime

__all__ = ["received_by_layer"]


def received_by_layer(runtime: Runtime, inputs: Mapping[str, Any]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """
    Attention that visual tokens receive, maximum over heads.

    Parameters
    ----------
    runtime
        Of the model; its patches are suspended meanwhile.
    inputs
        Of ``model(...)``.

    Returns
    -------
    list
        Per row, two lists with a float32 tensor ``[V]`` on the CPU per decoder layer: from visual rows, and from the
        text behind the first image.

    Raises
    ------
    PromptError
        A row has no image.
    """
    family = runtime.family
    found: list[Tensor | int] = [0] * family.num_layers
    layouts = []

    def hears(layer: int) -> Callable[[Tensor, Tensor, Tensor, Edit], None]:
        def hear(weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
            layouts.append(edit.stage.layout)
            found[layer] = found[layer] + received_by_side(weights, rows, members, edit.stage.layout).cpu()

        return hear

    with runtime.suspended() as attachments, torch.inference_mode():
        probes = [DecoderProbe(layer, "all", hears=hears(layer)) for layer in range(family.num_layers)]
        AttentionEngine(runtime, [], probes).attach(attachments)
        family.model(**inputs, use_cache=False)
    samples = []
    for row, visual in enumerate(layouts[0].visual.cpu()):
        if not visual.any():
            raise PromptError(f"row {row} has no image, so that no visual token receives attention; leave it out")
        sides = [layer[row][:, visual].unbind() for layer in found if isinstance(layer, Tensor)]
        samples.append(([own for own, _ in sides], [cross for _, cross in sides]))
    return samples
