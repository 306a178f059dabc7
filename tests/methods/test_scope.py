"""SCOPE against loops over coverage."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from tests.methods.choosing import FAMILIES, compare, plain, prompt_state
from tests.reference import diversity
from tests.reference.reduction import tower_attention
from tests.zoo import build

HEADS = 4


@pytest.mark.parametrize(("mode", "alpha"), [("multiply", 1.0), ("multiply", 0.5), ("add", 1.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, mode, alpha):
    def naive(group):
        attention = group.probes["vision_cls" if "vision_cls" in group.probes else "vision_received"]
        features = group.probes.get("vision_states", group.states)
        # The released saliency is the sum over heads.
        saliency = (HEADS * attention).tolist()
        return plain(diversity.scope(features, saliency, 3, alpha, mode == "add"))

    method = lmmhooks.method("scope", keep=3, keep_per="crop", mode=mode, alpha=alpha)
    compare(family, method, naive, by_crop=True)


def test_it_reads_the_penultimate_layer_and_its_class_row():
    """Features and attention taken from the model itself, without any of our code."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    seen: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad(), tower_attention(zoo.model, seen):
        zoo.model(**inputs)
    with torch.no_grad():
        tower = zoo.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    features, saliency = tower.hidden_states[-2][0, 1:], seen[1][0][0, :, 0, 1:].sum(dim=0)
    state = prompt_state(zoo, inputs, "scope(keep=6)")
    (left,) = state.stages[0].layout.spans
    kept = (left.tokens.row * 4 + left.tokens.col).tolist()
    assert kept == sorted(diversity.scope(features, saliency.tolist(), 6, 1.0, False))


def test_without_saliency_coverage_decides_alone():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    state = prompt_state(zoo, inputs, "scope(keep=6, alpha=0.0)")
    shallow = prompt_state(zoo, inputs, "scope(keep=6, alpha=0.0, layer=0)")
    assert torch.equal(state.stages[0].index, shallow.stages[0].index)


def test_settings_out_of_range_are_refused_by_name():
    for settings in ({"alpha": -1.0}, {"mode": "max"}):
        with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
            lmmhooks.method("scope", keep=4, **settings)
    with pytest.raises(lmmhooks.MethodError, match="windows"):
        lmmhooks.wrap(build("qwen2_5_vl").model, "scope(keep=4, layer=2)")
