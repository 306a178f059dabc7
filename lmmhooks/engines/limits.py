"""What engines that leave layers with caches of different length cannot work with, refused with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache

from lmmhooks.errors import ModelError, PromptError

if TYPE_CHECKING:
    from lmmhooks.engines.state import PromptState
    from lmmhooks.family import Family

__all__ = ["refuse_caches", "refuse_layers", "refuse_rewound"]


def refuse_layers(family: Family, what: str) -> None:
    """
    Refuse decoders whose layers do not all keep every token (sliding windows, linear attention).

    Parameters
    ----------
    family
        The model family.
    what
        The subject of the sentence, such as ``"reduction"``.

    Raises
    ------
    ModelError
    """
    if odd := _odd_layers(DynamicCache(config=family.text_config)):
        raise ModelError(
            f"{type(family.text_model).__name__} has layers whose cache is a {odd}, which counts tokens that a "
            f"{what} removes; {what} needs layers that all see everything"
        )


def refuse_caches(kwargs: dict[str, Any], what: str) -> None:
    """
    Refuse caches whose layers cannot differ in length, and masks that are already prepared for one.

    Parameters
    ----------
    kwargs
        What the decoder is called with.
    what
        As in `refuse_layers`.

    Raises
    ------
    PromptError
    """
    cache = kwargs.get("past_key_values")
    if cache is not None:
        odd = _odd_layers(cache)
        if not isinstance(cache, DynamicCache) or odd or cache.offloading:
            kind = "offloaded" if getattr(cache, "offloading", False) else odd
            raise PromptError(
                f"{what} was given a {type(cache).__name__} ({kind}), whose layers cannot differ in length; "
                "leave out cache_implementation, or pass a plain DynamicCache"
            )
    mask = kwargs.get("attention_mask")
    if mask is not None and (isinstance(mask, dict) or mask.dim() != 2):
        shape = "a dict" if isinstance(mask, dict) else f"of shape {tuple(mask.shape)}"
        raise PromptError(f"{what} needs an attention_mask [batch, length] with 0 for padding; it was given {shape}")


def refuse_rewound(state: PromptState, position_ids: Tensor, what: str) -> None:
    """
    Refuse tokens that do not continue the prompt: the caller counts cache entries, some of which were removed.

    Parameters
    ----------
    state
        The prompt, of which a step has begun.
    position_ids
        ``[..., B, new tokens]`` as given.
    what
        What has shortened the cache, such as ``"a reduction before the decoder"``.

    Raises
    ------
    PromptError
    """
    assert state.next_position is not None
    last = position_ids[..., -1]
    last = last[-3:].amax(dim=0) if last.dim() == 2 else last
    expected = state.next_position + state.grown - 1
    if bool((last.to(expected.device) != expected).any()):
        raise PromptError(
            f"{state.num_queries} new tokens end at position {int(last.max())} instead of {int(expected.max())}: "
            f"generate() continues an earlier cache by its length, which {what} has changed; "
            "pass the whole conversation with an empty cache"
        )


def _odd_layers(cache: Any) -> str:
    """Names of cache layers that do not simply hold every token."""
    return ", ".join(sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())} - {"DynamicLayer"}))
