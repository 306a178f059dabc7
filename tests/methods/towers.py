"""Comparison of a reducer inside the vision tower with the naive tower, from pixels to logits of the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from tests.reference.reduction import keep_only, reduced_logits
from tests.reference.tower import Rule, naive_crop, naive_tower
from tests.zoo import Zoo, build, encode

# float32 through up to seven vision and four decoder layers, batched against single rows; largest difference seen is
# 6e-6 on logits of about 3.
TOLERANCE = 3e-5
# Features of the tower, whose states are of size 1 to 10.
FEATURES = 1e-5
STEPS = 3
SIDE = 4

#: Per row, images of the prompts that each family is tested with. OneVision interpolates the tiles of a lone image.
IMAGES = {"llava": [1, 2], "llava_next": [1, 2], "llava_onevision": [2, 2]}


def tower_features(zoo: Zoo, pixels: Tensor) -> Tensor:
    """``[crops, slots, C]`` what the projector takes of some crops."""
    last = resolve(zoo.model).feature_layer
    with torch.no_grad():
        return zoo.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[last + 1]


def check_features(
    family: str, method: Any, make_rule: Callable[[], Rule], *, depth: int = 7, weigh: bool = False
) -> list[int]:
    """Survivors and all slots of five crops against the naive tower; returns the number of survivors per crop."""
    zoo = build(family, tower_layers=depth)
    last = resolve(zoo.model).feature_layer
    first = int(resolve(zoo.model).has_cls)
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with lmmhooks.wrap(zoo.model, method):
        runtime = find_runtime(zoo.model)
        assert runtime is not None
        features = tower_features(zoo, pixels)
        ((kept,),) = runtime.readings.values()
    counts = []
    for crop, image in enumerate(pixels):
        survivors, slots = naive_crop(zoo.model.model.vision_tower, image, make_rule(), last, weigh)
        patches = [slot - first for slot in sorted(survivors) if slot >= first]
        assert kept[crop, :, 0].nonzero().flatten().tolist() == patches
        torch.testing.assert_close(features[crop], slots, atol=FEATURES, rtol=1e-5)
        counts.append(len(patches))
    return counts


def check_answers(
    family: str, method: Any, make_rule: Callable[[], Rule], *, depth: int = 7, weigh: bool = False
) -> None:
    """Logits of a left-padded batch of two at prefill and three steps, against the naive tower and decoder."""
    zoo, eager = build(family, tower_layers=depth), build(family, attn="eager", tower_layers=depth)
    inputs = zoo.inputs(batch=2, images=IMAGES[family])
    with lmmhooks.wrap(zoo.model, method):
        with torch.no_grad():
            logits = zoo.model(**inputs).logits
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        runtime = find_runtime(zoo.model)
        assert runtime is not None
        layout = runtime.last_state.layout
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
    assert (logits[:, -1] - plain[:, -1]).abs().max() > 1e-2, "a reduction that changes nothing proves nothing"
    resolved = resolve(zoo.model)
    (call,) = encode(zoo, inputs)
    crops = resolved.crops_of(call)
    first, length = int(resolved.has_cls), inputs["input_ids"].shape[1]
    answer = out.sequences[:, length:]
    with naive_tower(eager.model, make_rule, resolved.feature_layer, weigh) as kept:
        for row in range(2):
            number = layout.valid[row].long().cumsum(dim=0) - 1
            with torch.no_grad():
                eager.model(**inputs)
            visual, stay = set(), []
            for span in layout.spans_of(row):
                visual |= set(number[span.positions].tolist())
                slots = kept[-1][sum(crops[: span.source]) :]
                for position, crop, r, c in zip(
                    number[span.positions].tolist(), *(x.tolist() for x in (span.tokens.crop, span.tokens.row,
                    span.tokens.col)), strict=True,
                ):  # fmt: skip
                    if crop >= 0 and first + r * SIDE + c in slots[crop]:
                        stay.append(position)
            cuts = {0: (keep_only(visual, stay), True)}
            expected = reduced_logits(eager.model, inputs, row, cuts)
            valid = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row, valid], expected, atol=TOLERANCE, rtol=0)
            steps = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-STEPS:]
            torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], steps, atol=TOLERANCE, rtol=0)
