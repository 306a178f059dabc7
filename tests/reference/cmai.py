"""Cross-modality attention inhibition the slow way: the full map of a layer, one text and image token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.attention import Edit

HIDDEN = torch.finfo(torch.float32).min


def inhibited_pairs(a: Tensor, image: Sequence[int], texts: Sequence[int], ratio: float) -> dict[int, list[int]]:
    """Image tokens hidden from each text token, from head-mean attention ``[N, N]``."""
    hidden = {}
    for t in texts:
        seen = [v for v in image if v < t]
        f = {}
        for v in seen:
            f[v] = float(a[t, v])
            for earlier in texts:
                if earlier < t:
                    f[v] += float(a[t, earlier]) * float(a[earlier, v]) * (v < earlier)
        count = min(int(ratio * len(seen) + 1e-3), len(seen) - 1)
        hidden[t] = sorted(seen, key=lambda v: f[v])[:count]
    return hidden


def cmai(
    prompt_ids: Tensor,
    image_token: int,
    ratio: float,
    focus_layer: int,
    per_layer: bool = False,
    gone: dict[int, dict[int, set[int]]] | None = None,
) -> Edit:
    """Works on logits; ``gone`` are keys that a layer does not see, by layer and row of the batch."""
    found: dict[int, dict[int, list[int]]] = {}

    def edit(layer: int, scores: Tensor, row: int, hidden: Tensor) -> Tensor:
        length = scores.shape[1]
        ids = prompt_ids[row].tolist() + [-1] * (length - prompt_ids.shape[1])
        left_out = (gone or {}).get(layer, {}).get(row, set())
        scores[:, :, sorted(left_out)] = -1e9
        if layer < focus_layer:
            return scores
        image = [j for j, token in enumerate(ids) if token == image_token and j not in left_out]
        texts = [j for j, token in enumerate(ids) if image and j > image[0] and token not in (0, image_token)]
        if layer == focus_layer or per_layer:
            may = torch.ones(length, length, dtype=torch.bool).tril() & (torch.tensor(ids) != 0)
            weights = torch.softmax(scores.masked_fill(~may, HIDDEN), dim=-1)
            found[row] = inhibited_pairs(weights.mean(dim=0), image, texts, ratio)
            if not per_layer:
                return scores
        for t in texts:
            rest = [v for v in image if v < t and v not in found[row][t]]
            if rest:
                scores[:, t, found[row][t]] = HIDDEN
        return scores

    return edit
