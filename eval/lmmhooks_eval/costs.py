"""
What a variant cost, from the stored lines: medians over batches, and ratios to the baseline on the same batches.

Times belong to batches, so a batch counts once however many answers it holds. The first batch of a pass pays for
warming up (allocator, kernels, a method's own calibration) and is left out wherever there is another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from lmmhooks_eval.store import Record

__all__ = ["summarise"]

Batches = dict[Hashable, list[Record]]


def summarise(records: Sequence[Record], reference: Sequence[Record]) -> dict[str, Any]:
    """
    Cost of one pass.

    Parameters
    ----------
    records
        Answers of the pass.
    reference
        Answers of the baseline to the same documents.

    Returns
    -------
    dict
        Times in milliseconds per batch (``median``, ``p90``), ``decode_tokens_per_s`` (None if every answer is one
        token long: there is no decode step to time), visual tokens per document, ``kv_mib`` and ``prefill_gflops``
        per document, and ``relative``: the ratios to the baseline, below 1 where the variant needs less. There,
        ``prefill_limit`` is what the whole prefill would come to by its FLOPs, the tower untouched: the limit that a
        prompt sets which was as short to begin with. Empty without answers.
    """
    if not records:
        return {}
    batches = _batches(records)
    timed = _without_warm_up(batches)
    heads = [rows[0] for rows in timed.values()]
    kept = np.asarray([record["visual_kept"] for record in records if record.get("visual_kept")], dtype=float)
    memory = [head["batch_memory_mib"] for head in heads if head["batch_memory_mib"] is not None]
    return {
        "batches": len(heads),
        "batch_size": float(np.median([head["batch_size"] for head in heads])),
        "preprocess_ms": _spread([head["batch_preprocess_ms"] for head in heads]),
        "prefill_ms": _spread([head["batch_prefill_ms"] for head in heads]),
        "decode_tokens_per_s": _decode_speed(list(timed.values())),
        "new_tokens": float(np.mean([record["new_tokens"] for record in records])),
        "visual_in": float(np.mean([record["visual_tokens"] for record in records])),
        "visual_kept": float(kept.mean()) if kept.size else None,
        "visual_kept_per_layer": [round(value, 3) for value in kept.mean(axis=0)] if kept.size else None,
        "kv_mib": _mean(_per_document(heads, _kv_mib)),
        "prefill_gflops": _mean(_per_document(heads, _gflops)),
        "peak_memory_mib": max(memory, default=None),
        "relative": _relative(batches, _batches(reference)),
    }


def _batches(records: Sequence[Record]) -> Batches:
    """Group answers that were computed together; after running out of memory one planned batch is several."""
    groups: Batches = {}
    for record in records:
        groups.setdefault((record["batch"], record["batch_size"], record["batch_prefill_ms"]), []).append(record)
    return groups


def _without_warm_up(batches: Batches) -> Batches:
    keys = list(batches)
    return {key: batches[key] for key in (keys[1:] or keys)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "p90": float(np.quantile(values, 0.9))}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _per_document(heads: Sequence[Record], of: Callable[[Record], float | None]) -> list[float]:
    found = ((head, of(head)) for head in heads)
    return [value / head["batch_size"] for head, value in found if value is not None]


def _kv_mib(head: Record) -> float | None:
    return None if head["batch_kv_bytes"] is None else sum(head["batch_kv_bytes"]) / (1 << 20)


def _gflops(head: Record) -> float | None:
    flops = head.get("batch_prefill_flops")
    return None if flops is None else flops / 1e9


def _decode_speed(groups: Sequence[Sequence[Record]]) -> float | None:
    """Tokens after the first, over all rows, per second of decoding."""
    tokens = seconds = 0.0
    for rows in groups:
        if rows[0]["batch_decode_ms"] is not None:
            tokens += sum(row["new_tokens"] - 1 for row in rows)
            seconds += rows[0]["batch_decode_ms"] / 1000
    return tokens / seconds if tokens and seconds else None


def _relative(batches: Batches, reference: Batches) -> dict[str, float | None]:
    """Ratios over batches of the same documents: times as the median of ratios, counted quantities as ratio of sums."""

    def documents(groups: Batches) -> Mapping[Hashable, Record]:
        return {tuple(sorted(row["doc_id"] for row in rows)): rows[0] for rows in _without_warm_up(groups).values()}

    own, other = documents(batches), documents(reference)
    pairs = [(own[key], other[key]) for key in own.keys() & other.keys()]

    def times(name: str) -> float | None:
        # Per step, so that a variant that talks longer is not taken for a slower one.
        ratios = []
        for a, b in pairs:
            if a[name] is None or b[name] is None:
                continue
            steps = (a["batch_steps"] - 1, b["batch_steps"] - 1) if name == "batch_decode_ms" else (1, 1)
            ratios.append((a[name] / steps[0]) / (b[name] / steps[1]))
        return float(np.median(ratios)) if ratios else None

    def totals(of: Callable[[Record], float | None]) -> float | None:
        counted = [(of(a), of(b)) for a, b in pairs]
        above = sum(a for a, b in counted if a is not None and b is not None)
        below = sum(b for a, b in counted if a is not None and b is not None)
        return above / below if below else None

    def limit() -> float | None:
        above = below = 0.0
        for a, b in pairs:
            own, other, vision = _gflops(a), _gflops(b), b.get("batch_vision_flops")
            if own is not None and other is not None and vision is not None:
                above, below = above + own + vision / 1e9, below + other + vision / 1e9
        return above / below if below else None

    return {
        "prefill_time": times("batch_prefill_ms"),
        "prefill_flops": totals(_gflops),
        "prefill_limit": limit(),
        "step_time": times("batch_decode_ms"),
        "kv_bytes": totals(_kv_mib),
    }
