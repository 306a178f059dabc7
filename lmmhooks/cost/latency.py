"""A roofline estimate of prefill and decode time, to hold measured times against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lmmhooks.cost.decoder import DecoderShape, LayerCounts, layer_macs, prefill_macs

__all__ = ["Device", "calibrate_compute", "decode_seconds", "prefill_seconds"]


@dataclass(frozen=True)
class Device:
    """
    What a device can do, and what share of it is reached.

    Parameters
    ----------
    peak_flops
        FLOP/s of the data type in use (A100, bfloat16: 312e12).
    bandwidth
        Memory bytes/s (A100 80 GB: 2.0e12).
    compute_efficiency
        Share of the peak that matrix products reach, in (0, 1].
    bandwidth_efficiency
        Share of the bandwidth that reading weights and cache reaches, in (0, 1].
    launch_seconds
        Time per layer that no arithmetic hides.
    """

    peak_flops: float
    bandwidth: float
    compute_efficiency: float = 0.5
    bandwidth_efficiency: float = 0.7
    launch_seconds: float = 0.0


def prefill_seconds(
    device: Device,
    shape: DecoderShape,
    counts: Iterable[LayerCounts],
    batch: int = 1,
    bytes_per_element: int = 2,
    vision_seconds: float = 0.0,
) -> float:
    """
    Predicted prefill time: per layer the slower of arithmetic and reading the weights.

    Parameters
    ----------
    device
        The device.
    shape
        The decoder.
    counts
        One entry per layer, for one sequence.
    batch
        Sequences prefilled together.
    bytes_per_element
        Bytes per weight.
    vision_seconds
        Time of vision tower and projector, measured or estimated.

    Returns
    -------
    float
        Seconds.
    """
    read = shape.linear_macs_per_token * bytes_per_element / device.bandwidth
    compute = device.peak_flops * device.compute_efficiency
    layers = list(counts)
    busy = sum(max(2 * batch * layer_macs(shape, layer) / compute, read) for layer in layers)
    return busy + len(layers) * device.launch_seconds + vision_seconds


def decode_seconds(
    device: Device,
    shape: DecoderShape,
    cache_entries: Sequence[int],
    step: int = 0,
    batch: int = 1,
    bytes_per_element: int = 2,
) -> float:
    """
    Predicted time of one decode step, which reads all weights once and every sequence's cache.

    Parameters
    ----------
    device
        The device.
    shape
        The decoder.
    cache_entries
        Entries that the prefill left in each layer's cache.
    step
        Tokens generated before this one.
    batch
        Sequences decoded together.
    bytes_per_element
        Bytes per weight and per cache entry.

    Returns
    -------
    float
        Seconds.
    """
    weights = len(cache_entries) * shape.linear_macs_per_token + shape.width * shape.vocabulary
    cache = batch * sum(entries + step for entries in cache_entries) * 2 * shape.kv_width
    moved = (weights + cache) * bytes_per_element
    return moved / (device.bandwidth * device.bandwidth_efficiency) + len(cache_entries) * device.launch_seconds


def calibrate_compute(
    device: Device, shape: DecoderShape, counts: Iterable[LayerCounts], measured_seconds: float, batch: int = 1
) -> Device:
    """
    Return the device with the compute efficiency that a measured baseline prefill shows.

    Parameters
    ----------
    device
        The device; only its efficiency is replaced.
    shape
        The decoder.
    counts
        One entry per layer of the measured run.
    measured_seconds
        Its prefill time, vision not included.
    batch
        Sequences prefilled together.

    Returns
    -------
    Device

    Raises
    ------
    ValueError
        A measured time that is not positive.
    """
    if measured_seconds <= 0:
        raise ValueError(f"measured_seconds is {measured_seconds}: it has to be positive")
    flops = 2 * batch * prefill_macs(shape, counts)
    return replace(device, compute_efficiency=flops / (measured_seconds * device.peak_flops))
