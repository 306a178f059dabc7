"""From what the command line says to a loaded model: device, data type, named shape or weights."""

from __future__ import annotations

from typing import Any

import torch

from lmmhooks.bench.shapes import build_model
from lmmhooks.errors import LmmhooksError, closest

__all__ = ["load_target", "resolve_device", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str | None) -> torch.device:
    """
    Choose the device: the one named, or what :func:`lmmhooks.load` takes, the first CUDA device or else the CPU.

    Raises
    ------
    LmmhooksError
        A name torch does not know, or a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise LmmhooksError(f"device {name!r} cannot be used ({reason}); `lmmhooks doctor` lists devices") from None
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Choose the data type: the one named, or bfloat16 on an accelerator and float32 on CPU."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise LmmhooksError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}{closest(name, _DTYPES)}")
    return _DTYPES[name]


def load_target(
    model: str | None,
    config: str | None,
    layers: int | None,
    vision_layers: int | None,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
) -> tuple[Any, Any]:
    """
    Build or load the model to measure, and its processor; None for a named shape.

    Raises
    ------
    LmmhooksError
        Layer counts for a model with weights; an unknown shape; whatever loading refuses.
    """
    if config is not None:
        return build_model(config, layers, vision_layers, dtype, device, backend), None
    if layers is not None or vision_layers is not None:
        raise LmmhooksError("--layers and --vision-layers scale a named shape (--config); a loaded model has its own")
    from lmmhooks.loading import load

    return load(str(model), dtype=dtype, device=str(device), attn_implementation=backend)
