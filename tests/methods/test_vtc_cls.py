"""VTC-CLS against full attention matrices of every layer it sums."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.vtc_cls import VTCCLS
from tests.methods.tower_readings import FAMILIES, check, per_crop, untouched
from tests.reference import tower_reducers as naive
from tests.zoo import build


def layers_of(family: str, **settings) -> list[int]:
    return VTCCLS(keep=4, **settings).layers(resolve(build(family).model))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family):
    layers = {"llava": [0, 1], "llava_next": [0, 1], "qwen2_5_vl": [1, 3], "qwen3_vl": [0, 1, 2, 3]}.get(
        family, [0, 1, 2]
    )
    assert layers_of(family, start=0) == layers
    check(
        family,
        VTCCLS(keep=3, keep_per="crop", start=0),
        per_crop(lambda crop: untouched(naive.vtc_cls([crop.salient(layer) for layer in layers], 3))),
    )


def test_layers_are_those_from_the_start_to_what_the_projector_reads():
    assert layers_of("llava") == [1], "two thirds of three layers are past the last that counts"
    assert layers_of("llava", start=1) == [1]
    assert layers_of("qwen2_5_vl") == [3]
    assert layers_of("qwen2_vl") == [2, 3]


def test_the_published_layers_on_towers_of_published_depth():
    clip = resolve(build("llava").model)
    clip.vision_layers, clip.feature_layer = [None] * 24, 22
    assert VTCCLS(keep=4).layers(clip) == [16, 17, 18, 19, 20, 21, 22]
    qwen = resolve(build("qwen2_5_vl").model)
    qwen.vision_layers, qwen.feature_layer, qwen.full_attention_vision_layers = [None] * 32, 31, (7, 15, 23, 31)
    assert VTCCLS(keep=4).layers(qwen) == [23, 31]


def kept(zoo, inputs, spec):
    with torch.no_grad(), lmmhooks.wrap(zoo.model, spec):
        zoo.model(**inputs)
        return find_runtime(zoo.model).last.stages[0].index


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_one_layer_is_fastervlm(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    last = resolve(zoo.model).feature_layer
    assert torch.equal(kept(zoo, inputs, f"vtc-cls(keep=5, start={last})"), kept(zoo, inputs, "fastervlm(keep=5)"))
    assert not torch.equal(kept(zoo, inputs, "vtc-cls(keep=5, start=0)"), kept(zoo, inputs, "fastervlm(keep=5)"))


@pytest.mark.parametrize(
    ("family", "start", "reason"), [("llava", 2, "last one that counts is 1"), ("llava", -1, "start=-1"),
                                    ("qwen2_5_vl", 4, "last one that counts is 3")]
)  # fmt: skip
def test_starts_past_the_last_layer_are_refused_at_wrap(family, start, reason):
    with pytest.raises(lmmhooks.MethodError, match=reason):
        lmmhooks.wrap(build(family).model, f"vtc-cls(keep=4, start={start})")
