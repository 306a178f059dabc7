"""Tensors as the value of a setting: named, immutable, equal by content and small when written down."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TensorSet"]


class TensorSet(Mapping[str, "Tensor"]):
    """
    Named tensors that a method needs and that are too large for a recipe, such as steering directions.

    Two sets are equal when they hold the same numbers. Written down (`plain`), a set is its digest and shapes, so that
    it counts in the identity of an answer as any other setting does.

    Parameters
    ----------
    tensors
        By name, any float dtype and device; copied to float32 on the CPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensors[name].detach().float().cpu().clone() for name in sorted(tensors)}
        self._placed: dict[Any, dict[str, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def on(self, device: Any) -> Mapping[str, Tensor]:
        """The tensors on a device; moved there once."""
        if device not in self._placed:
            self._placed[device] = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self._placed[device]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and float32 values, in hexadecimal."""
        state = hashlib.sha256()
        for name, tensor in self._tensors.items():
            state.update(f"{name} {tuple(tensor.shape)}".encode())
            state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()

    def plain(self) -> dict[str, Any]:
        """What stands for the set in JSON."""
        return {"digest": self.digest, "shapes": {name: list(tensor.shape) for name, tensor in self._tensors.items()}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorSet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"TensorSet({shapes}; {self.digest[:12]})"
