"""
What a generation takes, seen from the outside of ``generate``: when its tokens exist, and what its cache holds.

Nothing is attached to the model. A stopping criterion that never stops is called once per generated token; it notes the
time, and with it the end of the prefill, on any model and under any method.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria

__all__ = ["TokenClock", "kv_cache_bytes", "synchronizer"]


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has finished its queue; does nothing on CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


class TokenClock(StoppingCriteria):
    """
    Notes when the first and the last token of a batch exist.

    Waits for the device at the first token only: at later tokens ``generate`` itself waits, to see whether to stop.

    Parameters
    ----------
    device
        Where the model computes.

    Attributes
    ----------
    prefill_ms
        From construction to the first token: image encoding, decoder prefill and choice of the token.
    decode_ms
        From the first token to the last; None with one token, for which no decode step was needed.
    steps
        Number of tokens generated, which is that of the longest answer.
    """

    def __init__(self, device: torch.device) -> None:
        self._synchronize = synchronizer(device)
        self._synchronize()
        self._start = time.perf_counter()
        self._first = self._last = self._start
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Note the time; never ask to stop."""
        if self.steps == 0:
            self._synchronize()
        self._last = time.perf_counter()
        if self.steps == 0:
            self._first = self._last
        self.steps += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Wait for the device after ``generate``; the last token's time is then that of its computation."""
        self._synchronize()
        if self.steps > 1:
            self._last = time.perf_counter()

    @property
    def prefill_ms(self) -> float:
        """Milliseconds to the first token."""
        return 1000 * (self._first - self._start)

    @property
    def decode_ms(self) -> float | None:
        """Milliseconds from the first token to the last."""
        return 1000 * (self._last - self._first) if self.steps > 1 else None


def kv_cache_bytes(cache: Any) -> list[int] | None:
    """
    Bytes of keys and values in every layer of a cache, as they are in memory.

    Parameters
    ----------
    cache
        A transformers cache after generation, or None.

    Returns
    -------
    list of int or None
        One number per layer (the layers' lengths differ after a reduction); None if there is no cache to look at.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    result = []
    for layer in layers:
        tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
        result.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor)))
    return result
