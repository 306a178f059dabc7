"""Attention calibration the slow way: one head, row and key at a time, on full attention matrices."""

from __future__ import annotations

from torch import Tensor

from tests.reference.attention import Edit
from tests.zoo import IMAGE, PAD


def received(weights: list[list[float]], real: list[int]) -> dict[int, float]:
    """Mean attention every key gets from the rows that can see it: those at or behind it."""
    means = {}
    for j in real:
        rows = [i for i in real if i >= j]
        means[j] = sum(weights[i][j] for i in rows) / len(rows)
    return means


def sinks(
    weights: list[list[float]],
    ids: list[int],
    *,
    thr: float | None,
    alpha: float | None,
    min_rows: int,
    exclude_image: bool,
) -> list[int]:
    """Keys that get too much attention, without the first of them; ``thr=None`` takes ``alpha / N``."""
    real = [j for j, token in enumerate(ids) if token != PAD]
    threshold = thr if thr is not None else alpha / len(real)
    detected = []
    for j, mean in sorted(received(weights, real).items()):
        rows = len([i for i in real if i >= j])
        if mean > threshold and rows >= min_rows:
            detected.append(j)
    return [j for j in detected[1:] if not (exclude_image and ids[j] == IMAGE)]


def calibrate_row(row: list[float], chosen: list[int], beta: float) -> list[float]:
    """``A'``: sinks times beta, everything else times ``1 + (1 - beta) m / (1 - m)``."""
    total = sum(row)
    row = [weight / total for weight in row]
    m = sum(row[j] for j in chosen)
    if m >= 1:
        return row
    return [w * beta if j in chosen else w * (1 + (1 - beta) * m / (1 - m)) for j, w in enumerate(row)]


def act(
    prompt_ids: Tensor,
    heads: dict[int, list[int]],
    *,
    beta: float = 0.4,
    thr: float | None = 0.1,
    alpha: float | None = None,
    min_rows: int = 1,
    exclude_image: bool = False,
    found: dict[tuple[int, int, int], list[int]] | None = None,
) -> Edit:
    """
    Edit of `dense_attention`; sinks come from the rows of the prompt and hold for the answer too.

    ``found`` collects them by (row of the batch, layer, head).
    """
    length = prompt_ids.shape[1]

    def edit(layer: int, weights: Tensor, row: int, hidden: Tensor) -> Tensor:
        ids = prompt_ids[row].tolist()
        for h in heads.get(layer, []):
            matrix = weights[h].tolist()
            prompt = [line[:length] for line in matrix[:length]]
            chosen = sinks(prompt, ids, thr=thr, alpha=alpha, min_rows=min_rows, exclude_image=exclude_image)
            if found is not None:
                found[row, layer, h] = chosen
            for i in range(len(matrix)):
                if i >= length or ids[i] != PAD:
                    weights[h, i] = weights.new_tensor(calibrate_row(matrix[i], chosen, beta))
        return weights

    return edit
