"""
Decoding methods the slow way: at every step, every branch is a forward of its own over the whole sequence, no cache.

As a logits processor of the untouched model it replaces whatever the model said, so the same loops of ``generate``
(greedy, sampling, beams) run on naive logits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.reference.attention import full_logits

#: (main logits [V], logits of the others, step) of one row -> logits [V]
Combine = Callable[[Tensor, list[Tensor], int], Tensor]


class NaiveBranches(LogitsProcessor):
    """
    Combined logits by separate forwards.

    ``inputs`` and ``others`` are arguments of a forward, one per branch, with the same rows in the same order.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], others: Sequence[dict[str, Any]], combine: Combine) -> None:
        self.model = model
        self.branches = [inputs, *others]
        self.combine = combine
        self.length = inputs["input_ids"].shape[1]
        self.batch = inputs["input_ids"].shape[0]

    def logits(self, answer: Tensor) -> Tensor:
        """``[B, vocabulary]`` after ``answer [B, t]``."""
        per_branch = [full_logits(self.model, branch, answer)[:, -1] for branch in self.branches]
        rows = []
        for row in range(self.batch):
            main, *others = (logits[row] for logits in per_branch)
            rows.append(self.combine(main, others, answer.shape[1]))
        return torch.stack(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answers = input_ids[:, self.length :]
        copies = len(answers) // self.batch
        out = torch.empty_like(scores)
        for copy in range(copies):
            out[copy::copies] = self.logits(answers[copy::copies])
        # Beam search adds log-probabilities; softmax and argmax do not mind.
        return out.log_softmax(dim=-1)


def naive_generate(
    model: Any, inputs: dict[str, Any], others: Sequence[dict[str, Any]], combine: Combine, **kwargs: Any
) -> Tensor:
    """New tokens ``[rows, t]`` of the untouched model's ``generate`` on naive logits."""
    naive = NaiveBranches(model, inputs, others, combine)
    out = model.generate(**inputs, logits_processor=LogitsProcessorList([naive]), **kwargs)
    return out[:, naive.length :]


def vcd(alpha: float, beta: float) -> Combine:
    """The contrast formula, token by token."""

    def combine(main: Tensor, others: list[Tensor], step: int) -> Tensor:
        (noised,) = others
        cut = float(main.max()) + (math.log(beta) if beta else -math.inf)
        out = []
        for plain, changed in zip(main.tolist(), noised.tolist(), strict=True):
            out.append((1 + alpha) * plain - alpha * changed if plain >= cut else -math.inf)
        return torch.tensor(out)

    return combine


def signal_level(noise_step: int) -> float:
    """Signal variance left after a step of the schedule."""
    level = 1.0
    for step in range(noise_step + 1):
        level *= 1 - ((0.005 - 1e-5) / (1 + math.exp(6 - 12 * step / 999)) + 1e-5)
    return level


def generator_of(image: Tensor, seed: int, branch: str) -> torch.Generator:
    """Random numbers that belong to the pixels of an image ``[crops, C, H, W]``."""
    digest = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8)
    digest.update(f"{branch}/{seed}".encode())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))


def noised(image: Tensor, noise_step: int, seed: int, branch: str = "noised") -> Tensor:
    """One image ``[crops, C, H, W]`` with the noise that belongs to its pixels."""
    level = signal_level(noise_step)
    noise = torch.randn(image.shape, generator=generator_of(image, seed, branch))
    return math.sqrt(level) * image + math.sqrt(1 - level) * noise


def noised_inputs(
    zoo: Any, inputs: dict[str, Any], noise_step: int = 500, seed: int = 0, branch: str = "noised"
) -> dict[str, Any]:
    """Inputs of a tiny model with every image noised."""
    return changed_inputs(zoo, inputs, lambda image: noised(image, noise_step, seed, branch))


def changed_inputs(zoo: Any, inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Inputs of a tiny model with every image ``[crops, C, H, W]`` changed, each family's packing spelled out."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        out = _changed_patches(zoo, pixels, inputs["image_grid_thw"].tolist(), change)
    elif "image_sizes" in inputs:
        out = pixels.clone()
        for image in range(len(pixels)):
            # The zoo leaves the crops an image does not have at zero.
            crops = int((pixels[image].flatten(1) != 0).any(dim=1).sum())
            out[image, :crops] = change(pixels[image, :crops])
    else:
        out = torch.cat([change(image[None]) for image in pixels])
    return {**inputs, "pixel_values": out}


def _changed_patches(zoo: Any, pixels: Tensor, grids: list[list[int]], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Patch ``p`` of an image lies in merge group ``p // 4``, groups row by row; its values run over C, T, y, x."""
    size = zoo.recipe.patch
    out, start = torch.empty_like(pixels), 0
    for frames, rows, cols in grids:
        assert frames == 1
        where = []
        for group_row in range(rows // 2):
            for group_col in range(cols // 2):
                where += [(2 * group_row + y, 2 * group_col + x) for y in range(2) for x in range(2)]
        image = torch.empty(2, 3, rows * size, cols * size)
        for patch, (row, col) in enumerate(where):
            cell = pixels[start + patch].reshape(3, 2, size, size).transpose(0, 1)
            image[:, :, row * size : (row + 1) * size, col * size : (col + 1) * size] = cell
        still = torch.equal(image[0], image[1])
        image = change(image[:1]).expand(2, -1, -1, -1) if still else change(image)
        for patch, (row, col) in enumerate(where):
            cell = image[:, :, row * size : (row + 1) * size, col * size : (col + 1) * size]
            out[start + patch] = cell.transpose(0, 1).flatten()
        start += len(where)
    return out


def without_image(inputs: dict[str, Any], visual_ids: Sequence[int]) -> dict[str, Any]:
    """Inputs without visual tokens and pixels, padded on the left anew."""
    bare = edited_inputs(inputs, lambda row: [token for token in row if token not in visual_ids])
    return {name: bare[name] for name in ("input_ids", "attention_mask")}


def edited_inputs(inputs: dict[str, Any], edit: Callable[[list[int]], list[int]]) -> dict[str, Any]:
    """Inputs with the tokens of every row edited, padded on the left anew; images stay."""
    rows = [
        edit([token for token, valid in zip(row, mask, strict=True) if valid])
        for row, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    ]
    length = max(map(len, rows))
    out = {
        **inputs,
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    if "mm_token_type_ids" in inputs:
        # Of the ids a kind is given to in the prompt as it was: everything else is text.
        kinds = dict(
            zip(inputs["input_ids"].flatten().tolist(), inputs["mm_token_type_ids"].flatten().tolist(), strict=True)
        )
        out["mm_token_type_ids"] = torch.tensor(
            [[kinds.get(token, 0) for token in row] for row in out["input_ids"].tolist()], dtype=torch.int
        )
    return out
