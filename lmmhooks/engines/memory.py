"""Refuses a prompt whose rows no device has room for, before the decoder runs."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from lmmhooks import cost
from lmmhooks.errors import PromptError
from lmmhooks.family import Family

__all__ = ["available_bytes", "refuse_unfit"]

GIB = 1 << 30


def available_bytes(devices: Iterable[torch.device]) -> int | None:
    """
    Bytes that could be allocated on some devices together; None where that cannot be known.

    On CUDA what is free, the allocator's own reserve included. On CPU the whole memory of the machine: what the system
    reports as free leaves out file caches, which give way.
    """
    total = 0
    for device in devices:
        if device.type == "cuda":
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            total += torch.cuda.mem_get_info(device)[0] + held
        elif device.type == "cpu" and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys():
            total += os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        else:
            return None
    return total


def refuse_unfit(
    family: Family, method: str, batch: int, length: int, readings: int, readings_at_once: int, caches: bool
) -> None:
    """
    Refuse a batch for which there is no room.

    Parameters
    ----------
    family
        Of the model.
    method
        Id of the method that has every prompt read several times.
    batch, length
        Prompts, beams included, and their tokens.
    readings
        Rows per prompt, the main one included, each at least ``length`` tokens wide.
    readings_at_once
        How many of them one forward has.
    caches
        Whether keys and values are kept on the same devices.

    Raises
    ------
    PromptError
        Naming rows, bytes and the batch that would fit.
    """
    try:
        shape = cost.DecoderShape.from_config(family.text_config)
    except ValueError:
        return  # a decoder that the cost model does not cover
    devices = {next(layer.parameters()).device for layer in family.layers}
    available = available_bytes(sorted(devices, key=str))
    if available is None:
        return
    size = family.model.dtype.itemsize
    needed = cost.prompt_memory(shape, batch * readings, length, batch * readings_at_once, size)
    if not caches:
        needed = cost.PromptMemory(0, needed.activations)
    if needed.total <= available:
        return
    fits = needed.batch_that_fits(batch, available)
    names = ", ".join(sorted(map(str, devices)))
    free = "in all" if names == "cpu" else "free"
    remedy = (
        f"a batch of {fits} would fit: give fewer prompts, beams or return sequences at once"
        if fits
        else "not one prompt would fit: give a shorter prompt, a smaller image or fewer branches"
    )
    raise PromptError(
        f"{method} reads {batch * readings} rows of {length} tokens ({readings} for each of {batch}), which takes at "
        f"least {needed.cache / GIB:.3g} GiB of cache and {needed.activations / GIB:.3g} GiB of activations, but "
        f"{names} has {available / GIB:.3g} GiB {free}; {remedy}"
    )
