"""Comparison of reducers that score in the vision tower with their naive renderings, from readings to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from tests.reference.reduction import Choose, keep_only, reduced_logits
from tests.reference.tower_reducers import Crop, Kept, Tower, watched_tower
from tests.zoo import Zoo, build

# float32 through four layers, batched against single rows; largest difference seen is 8e-6 on logits of about 3.
TOLERANCE = 2e-5
STEPS = 3
#: One patch is a token (one crop, or tiles that were unpadded), four are (with deepstack, windows, or tiles).
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")

#: What stays of an image, by crop.
Rule = Callable[[list[Crop]], list[list[Kept]]]


def per_crop(rule: Callable[[Crop], list[Kept]]) -> Rule:
    return lambda crops: [rule(crop) for crop in crops]


def untouched(stay: list[int]) -> list[Kept]:
    """Tokens that keep their own states."""
    return [(i, None) for i in stay]


def merges_patches(family: str) -> bool:
    """Whether released code merges before the projector, which takes single patches."""
    return family in ("llava", "llava_next")


def images_of(zoo: Zoo, inputs: dict[str, Tensor], row: int) -> list[list[Crop]]:
    """The images of a row, crop by crop, as a plain model reads them."""
    family = resolve(zoo.model)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "reduction-identity"):
        zoo.model(**inputs)
        layout = find_runtime(zoo.model).last.layout
    with torch.no_grad(), watched_tower(family) as tower:
        zoo.model(**inputs)
    number = layout.valid[row].long().cumsum(dim=0) - 1
    spans = {span.source: span for span in layout.spans}
    first_crop = dict.fromkeys(spans, 0)
    for source in sorted(spans)[1:]:
        first_crop[source] = first_crop[source - 1] + len(spans[source - 1].tokens.grids)
    images = []
    for span in layout.spans_of(row):
        crops = []
        for crop, grid in enumerate(span.tokens.grids):
            members = (span.tokens.crop == crop).nonzero().flatten()
            rows, cols = span.tokens.row[members].tolist(), span.tokens.col[members].tolist()
            cells = [r * grid[1] + c for r, c in zip(rows, cols, strict=True)]
            q, k, output = _of_crop(zoo.name, tower, first_crop[span.source] + crop)
            patches = [_patches(zoo, inputs, span.source, grid, cell) for cell in cells]
            numbers = number[span.positions[members]].tolist()
            crops.append(Crop(q, k, output, patches, numbers, cells, grid, family.has_cls))
        images.append(crops)
    return images


def _of_crop(family: str, tower: Tower, crop: int) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
    if family.startswith("qwen"):
        # A call per image in layers that see all of it; windowed layers have more calls, and nobody reads them.
        calls = {layer: found[crop] for layer, found in tower.calls.items() if crop < len(found)}
        return {i: q[0] for i, (q, _) in calls.items()}, {i: k[0] for i, (_, k) in calls.items()}, {}
    calls = {layer: found[0] for layer, found in tower.calls.items()}
    states = {layer: output[crop] for layer, output in tower.states.items()}
    return {i: q[crop] for i, (q, _) in calls.items()}, {i: k[crop] for i, (_, k) in calls.items()}, states


def _patches(zoo: Zoo, inputs: dict[str, Tensor], image: int, grid: tuple[int, int], cell: int) -> list[int]:
    """Patches of a token, in the order of the tower's rows."""
    if zoo.name == "internvl":
        r, c = divmod(cell, grid[1])
        return [(2 * r + i) * 2 * grid[1] + 2 * c + j for i in (0, 1) for j in (0, 1)]
    if not zoo.name.startswith("qwen"):
        return [cell]
    if zoo.name == "qwen2_5_vl":
        tower = zoo.model.model.visual
        order, _ = get_vision_window_index(
            inputs["image_grid_thw"][image : image + 1],
            spatial_merge_size=2,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        cell = order.tolist().index(cell)
    return list(range(4 * cell, 4 * cell + 4))


def check(family: str, method: Any, rule: Rule) -> None:
    """Prefill and decoding of a left-padded batch of two against the naive decoder with the tokens that stay."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
    with lmmhooks.wrap(zoo.model, method):
        with torch.no_grad():
            prefill = zoo.model(**inputs).logits
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert (prefill[:, -1] - plain[:, -1]).abs().max() > 1e-2, "a reduction that changes nothing proves nothing"
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        cuts = {0: (_chooser(eager, inputs, row, rule), not resolve(zoo.model).mrope)}
        steps = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-STEPS:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], steps, atol=TOLERANCE, rtol=0)


def _chooser(zoo: Zoo, inputs: dict[str, Tensor], row: int, rule: Rule) -> Choose:
    images = images_of(zoo, inputs, row)
    family = resolve(zoo.model)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "reduction-identity"):
        zoo.model(**inputs)
        layout = find_runtime(zoo.model).last.layout
    number = layout.valid[row].long().cumsum(dim=0) - 1
    visual = {int(number[p]) for span in layout.spans_of(row) for p in span.positions}

    def choose(alive: list[Any], attention: Tensor | None, prompt: int) -> list[Any]:
        by_number = {token.number: token for token in alive}
        seen = set()
        for crops in images:
            for crop in crops:
                # Where patches make a token, its state is what is merged.
                crop.states = torch.stack([by_number[n].state for n in crop.numbers])
            for crop, kept in zip(crops, rule(crops), strict=True):
                for local, feature in kept:
                    if feature is not None:
                        projects = merges_patches(zoo.name)
                        state = family.projector(feature) if projects else feature
                        by_number[crop.numbers[local]].state = state
                alive = keep_only(set(crop.numbers), [crop.numbers[local] for local, _ in kept])(alive, None, prompt)
                seen |= set(crop.numbers)
        # What shows no place: newline tokens.
        return keep_only(visual - seen, [])(alive, None, prompt)

    return choose


def token_features(crop: Crop, family: str, layer: int) -> Tensor:
    """What is merged and compared: what the projector takes, or what the decoder takes."""
    assert crop.states is not None
    return crop.features(layer) if merges_patches(family) else crop.states
