"""FlowCut against a naive tower that keeps its scores in a dictionary."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.flowcut import FlowCut, flow_scores, step_sizes
from tests.methods.towers import check_answers, check_features
from tests.reference.tower import flowcut
from tests.zoo import build


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(("keep", "momentum"), [(4, 0.5), (7, 0.5), (4, 0.8), (1, 0.0)])
def test_features_equal_the_naive_tower(family, keep, momentum):
    method = FlowCut(keep=keep, momentum=momentum)
    counts = check_features(family, method, partial(flowcut, keep, 7, momentum), depth=9)
    assert counts == [keep] * 5


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_answers_equal_the_naive_tower(family):
    check_answers(family, FlowCut(keep=5), partial(flowcut, 5, 5, 0.5))


def test_crops_take_steps_of_their_own():
    """The largest step of the batch, as released, would make the first crop depend on the second."""
    attention = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    steps = step_sizes(attention, torch.tensor([4, 4]), 1, 4)
    entropy = -(0.97 * math.log(0.97) + 0.03 * math.log(0.01))
    assert steps.tolist() == [0, round(3 / 2 * (1 - (entropy / math.log(4)) ** 2))]


def test_even_attention_prunes_nothing_before_the_last_step():
    """Queries of zero attend evenly: every layer leaves all patches, the last step takes them down to the target."""
    zoo = build("llava", tower_layers=9)
    layers = zoo.model.model.vision_tower.encoder.layers
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    lengths: dict[int, int] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, i=i: lengths.update({i: args[0].shape[1]}))
        for i, layer in enumerate(layers)
    ]
    with lmmhooks.wrap(zoo.model, FlowCut(keep=5)), torch.no_grad():
        zoo.model(**zoo.inputs())
    for hook in hooks:
        hook.remove()
    assert lengths == {**dict.fromkeys(range(7), 17), 7: 6, 8: 17}


def test_survivors_enter_the_decoder_in_raster_order():
    zoo = build("llava", tower_layers=7)
    with lmmhooks.wrap(zoo.model, FlowCut(keep=6)), torch.no_grad():
        zoo.model(**zoo.inputs())
        index = find_runtime(zoo.model).last.stages[0].index[0]
    assert (index.diff() > 0).all()


def test_padding_changes_no_score():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 4, 9, 5, generator=generator)
    attention = torch.rand(3, 8, generator=generator)
    plain = flow_scores(attention, value)
    padded = torch.nn.functional.pad(value, (0, 0, 0, 2), value=3.0)
    valid = (torch.arange(11) < 9).expand(3, -1)
    scores = flow_scores(torch.nn.functional.pad(attention, (0, 2)), padded, valid)
    torch.testing.assert_close(scores[:, :8], plain)
    assert (scores[:, 8:] == 0).all()


@pytest.mark.parametrize("keep", [1.0, 16])
def test_keeping_everything_is_bit_identical(keep):
    zoo = build("llava", tower_layers=6)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, FlowCut(keep=keep)):
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_towers_without_a_class_token_are_refused():
    with pytest.raises(lmmhooks.MethodError, match="has no class token"):
        lmmhooks.wrap(build("llava_onevision").model, FlowCut(keep=4))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "keep=None"), ({"keep": 0}, "keep=0"), ({"keep": 4, "momentum": 1.0}, "momentum=1.0")],
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(lmmhooks.MethodError, match=f"flowcut: {named} is not allowed"):
        FlowCut(**settings)


def test_the_state_of_one_prompt_does_not_reach_the_next():
    zoo = build("llava", tower_layers=7)
    first, second = zoo.inputs(batch=1), zoo.inputs(batch=1, seed=1)
    with lmmhooks.wrap(zoo.model, FlowCut(keep=5)), torch.no_grad():
        expected = zoo.model(**second).logits
        zoo.model(**first)
        assert torch.equal(zoo.model(**second).logits, expected)
