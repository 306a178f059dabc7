"""Memory that an answer needs, by the allocator or the system; nothing is attached to the model."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["MemoryMeter"]

_MIB = 1 << 20


class MemoryMeter:
    """
    Memory an answer needs beyond what was there before it.

    On CUDA the allocator's peak minus what was allocated at the start (the weights, as a rule); on CPU under Linux the
    growth of the resident set, which says little for small models; elsewhere nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: float | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _resident_bytes()

    @property
    def measure(self) -> str:
        """What `mib` means on this device."""
        if self._device.type == "cuda":
            return "allocator peak minus allocation before the batch"
        return "growth of the resident set" if self._before is not None else "not measured"

    def mib(self) -> float | None:
        """MiB since construction; None where it cannot be measured."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / _MIB
        now = _resident_bytes()
        return None if now is None else max(0.0, now - self._before) / _MIB


def _resident_bytes() -> float | None:
    try:
        import resource

        return int(Path("/proc/self/statm").read_text().split()[1]) * float(resource.getpagesize())
    except (ImportError, OSError):
        return None
