"""Features that merging works on: the tower's, where single patches are projected, else what enters the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import TokenGroup

__all__ = ["embed", "feature_probes", "features", "merges_before_projector"]


def merges_before_projector(family: Any) -> bool:
    """Whether the tower's features can be changed and projected again, as released code for LLaVA does."""
    # A projector that reads several layers side by side does not take the features of one.
    layers = getattr(family.model.config, "vision_feature_layer", None)
    return bool(family.projects_patches) and not isinstance(layers, (list, tuple))


def feature_probes(family: Any) -> list[Probe]:
    """What `features` needs to have read."""
    return [Probe("vision_states", family.feature_layer)] if merges_before_projector(family) else []


def features(tokens: TokenGroup) -> Tensor:
    """
    Features of the tokens, ``[G, V, C]`` float32.

    What the projector takes, where it takes one patch at a time; elsewhere (pixel shuffle, 2 x 2 merger, interpolation)
    what the decoder takes, C being its width.
    """
    found = feature_probes(tokens.family)
    return tokens.probes[found[0].name] if found else tokens.states.float()


def embed(tokens: TokenGroup, values: Tensor) -> Tensor:
    """
    Features, after merging, as states for the decoder.

    Parameters
    ----------
    tokens
        Of the group they belong to.
    values
        ``[G, K, C]`` in the space of `features`.

    Returns
    -------
    Tensor
        ``[G, K, D]`` in the dtype and on the device of ``tokens.hidden``.
    """
    values = values.to(tokens.hidden.dtype)
    if merges_before_projector(tokens.family):
        values = tokens.family.project(values)
    return values.to(tokens.hidden.device)
