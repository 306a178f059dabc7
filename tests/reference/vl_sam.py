"""VL-SAM the slow way: the flow of one full forward, and blobs found by walking from cell to cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmmhooks.prompting import build_inputs
from tests.reference.maps import flow


def answer_flow(
    model: Any, processor: Any, image: Any, prompt: str, tokens: list[int], regularise: str
) -> tuple[Tensor, Tensor]:
    """Flow ``[N, N]`` over prompt and reply by one forward with all matrices, and where the image's tokens stand."""
    inputs = build_inputs(processor, [image], prompt)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(tokens))], dim=1)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    return flow([layer[0] for layer in attentions], regularise), places


def largest_blob(grid: list[list[float]], above: float) -> set[tuple[int, int]]:
    """Cells of the largest blob above a multiple of the mean; of equals, the one met first row by row."""
    rows, columns = len(grid), len(grid[0])
    mean = sum(map(sum, grid)) / (rows * columns)
    left = {(r, c) for r in range(rows) for c in range(columns) if grid[r][c] > above * mean}
    best: set[tuple[int, int]] = set()
    while left:
        edge = [min(left)]
        blob = set()
        while edge:
            cell = edge.pop()
            if cell in left:
                left.discard(cell)
                blob.add(cell)
                r, c = cell
                edge += [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
        if len(blob) > len(best):
            best = blob
    return best
