"""Peak memory of a computation, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


class _LiveBytes(TorchDispatchMode):
    """
    Adds up the storages that operators return while they are alive.

    What a fused kernel allocates for itself inside one operator is not seen; neither is memory that existed before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self._key(leaf) not in inputs:
                self._add(leaf)
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """
    Memory that a computation needs at its worst moment, beyond what was there before it.

    Parameters
    ----------
    run
        The computation; called once.
    device
        Where it computes.

    Returns
    -------
    int
        Bytes. On CUDA the allocator's peak minus what was allocated before; elsewhere the peak of the tensors that
        operators returned and that were alive at the same time, scratch memory inside kernels not included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as meter:
        run()
    return meter.peak
