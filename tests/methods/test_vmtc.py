"""VMTC against loops over clusters."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.methods.reduction.vmtc import cluster
from tests.engines.reducers import visual_groups
from tests.methods.choosing import FAMILIES, compare, prompt_state
from tests.reference import diversity
from tests.zoo import build


@pytest.mark.parametrize("primary", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, primary):
    project = getattr(build(family, attn="eager").model.model, "multi_modal_projector", None)

    def naive(group):
        attention = next(value for name, value in group.probes.items() if name != "vision_states").tolist()
        features = group.probes.get("vision_states")
        source = group.states if features is None else features
        num_primary = round(primary * 3)
        if num_primary == 3:
            return sorted((i, None) for i in sorted(range(len(attention)), key=lambda i: -attention[i])[:3])
        chosen = diversity.vmtc(source, attention, num_primary, 3 - num_primary)
        return [(i, mean if mean is None or features is None else project(mean[None])[0]) for i, mean in chosen]

    compare(family, lmmhooks.method("vmtc", keep=3, keep_per="crop", primary=primary), naive, by_crop=True)


def test_clusters_of_separate_directions_are_found():
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(8)[:4]
    which = torch.randint(0, 4, (40,), generator=generator)
    features = 5 * directions[which] + 0.3 * torch.randn(40, 8, generator=generator)
    member = cluster(features[None], torch.zeros(1, 1, dtype=torch.long), 4, 10)[0]
    assert torch.equal(member.sum(dim=0), torch.ones(40))
    label = member.argmax(dim=0)
    assert all((label[which == w] == label[which == w][0]).all() for w in range(4))
    assert len(label.unique()) == 4


def test_identical_tokens_leave_fewer():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        zoo.model.model.vision_tower.embeddings.position_embedding.weight.zero_()
        inputs["pixel_values"].fill_(0.5)
        with lmmhooks.wrap(zoo.model, "vmtc(keep=6, primary=0.5)") as patch:
            zoo.model(**inputs)
            # Sixteen equal patches: three stay, the others are one cluster.
            assert patch.stats.layers[0].visual_kept == (4,)


def test_counts_and_places():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    state = prompt_state(zoo, inputs, "vmtc(keep=0.375)")
    assert [len(span) for span in state.stages[0].layout.spans] == [6, 6]
    assert all((span.positions.diff() > 0).all() for span in state.stages[0].layout.spans)
    assert len(visual_groups(zoo.model, inputs, 0)[0]) == 16


def test_settings_out_of_range_are_refused_by_name():
    for settings in ({"primary": 1.5}, {"iterations": -1}):
        with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
            lmmhooks.method("vmtc", keep=4, **settings)
