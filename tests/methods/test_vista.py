"""VISTA against its naive rendering, and the invariants of its formulas."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.attention.vista import Vista, steer
from tests.reference.attention import full_logits
from tests.reference.decoding import noised_inputs
from tests.reference.steering import hooked, vista_logits
from tests.zoo import FAMILIES, build

# float32 through four layers in another summation order; directions are differences of two passes, which doubles the
# rounding. Largest difference seen is 6e-6.
TOLERANCE = 1e-5
STEPS = 3
LAM, GAMMA, LATE = 0.5, 0.3, (1, 2)
METHOD = Vista(lam=LAM, gamma=GAMMA, sla_layers=LATE)


def generate(zoo, inputs):
    """New tokens and logits ``[B, steps, vocabulary]``."""
    out = zoo.model.generate(
        **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def logits_of(zoo, inputs):
    with torch.no_grad():
        return zoo.model(**inputs).logits


@pytest.mark.parametrize("gamma", [GAMMA, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, gamma):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Vista(lam=LAM, gamma=gamma, sla_layers=LATE)):
        answer, logits = generate(zoo, inputs)
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -STEPS:]
    expected = vista_logits(zoo, inputs, answer[:, :-1], LAM, gamma, LATE)[:, -STEPS:]
    assert (expected - plain).abs().amax(dim=2).min() > 1e-1, "settings under which nothing is edited prove nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_late_layers_alone_change_the_logits_of_every_position(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Vista(lam=0.0, gamma=GAMMA, sla_layers=LATE)) as patch:
        assert not any("MLP" in entry for entry in patch.attached)
        logits = logits_of(zoo, inputs)
    expected = vista_logits(zoo, inputs, inputs["input_ids"][:, :0], 0.0, GAMMA, LATE)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_row_without_image_is_bit_identical(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=3, images=[1, 0, 1])
    plain = logits_of(zoo, inputs)
    with lmmhooks.wrap(zoo.model, METHOD):
        steered = logits_of(zoo, inputs)
        answer, logits = generate(zoo, inputs)
    assert torch.equal(steered[1], plain[1])
    assert (steered[[0, 2], -1] - plain[[0, 2], -1]).abs().amax(dim=1).min() > 1e-1
    expected = vista_logits(zoo, inputs, answer[:, :-1], LAM, GAMMA, LATE)[:, -STEPS:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_a_prompt_of_text_only_costs_no_pass_and_changes_nothing():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=0)
    plain = logits_of(zoo, inputs)
    forwards = []
    with lmmhooks.wrap(zoo.model, METHOD):
        handle = zoo.model.model.language_model.norm.register_forward_hook(lambda *_: forwards.append(1))
        assert torch.equal(logits_of(zoo, inputs), plain)
        handle.remove()
    assert len(forwards) == 1


@pytest.mark.parametrize("reducer", ["fastervlm(keep=4)", "random(keep=4)", "fastv(keep=4, layer=2)"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_directions_are_those_of_the_whole_prompt_under_a_reducer(family, reducer):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    directions = {}
    for methods in ((METHOD,), (reducer, METHOD)):
        with lmmhooks.wrap(zoo.model, *methods) as patch:
            _, logits = generate(zoo, inputs)
            state = find_runtime(zoo.model).last_state
            directions[len(methods)] = state.memory(patch.methods[-1])["direction"]
            _, one = generate(zoo, zoo.row(inputs, 0))
    assert torch.equal(directions[1], directions[2])
    torch.testing.assert_close(logits[:1], one, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_late_layers_on_both_sides_of_a_cut_are_mixed_where_their_tokens_were(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    states = {}
    with lmmhooks.wrap(zoo.model, "fastv(keep=4, layer=2)"):
        with hooked(zoo.model, read=lambda layer, output: states.__setitem__(layer, output)):
            plain = logits_of(zoo, inputs)
        index = find_runtime(zoo.model).last_state.stage_at(2).index
    with lmmhooks.wrap(zoo.model, "fastv(keep=4, layer=2)", Vista(lam=0.0, gamma=GAMMA, sla_layers=LATE)):
        logits = logits_of(zoo, inputs)
    assert states[2].shape[1] < states[1].shape[1]
    head = zoo.model.lm_head
    for row in range(2):
        for position in inputs["attention_mask"][row].nonzero().flatten().tolist():
            column = (index[row] == position).nonzero().flatten().tolist()
            # What has left before a layer says nothing there: its final state stands in.
            second = head(states[2][row, column[0]]) if column else plain[row, position]
            late = (head(states[1][row, position]) + second) / 2
            expected = (1 - GAMMA) * plain[row, position] + GAMMA * late
            torch.testing.assert_close(logits[row, position], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_branches_have_directions_of_their_own(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, METHOD, "vcd(alpha=1.0, beta=0.0)"):
        logits = logits_of(zoo, inputs)[:, -1]
    with lmmhooks.wrap(zoo.model, METHOD):
        main, other = (logits_of(zoo, prompt)[:, -1] for prompt in (inputs, noised_inputs(zoo, inputs)))
    # The contrast triples the rounding of each.
    torch.testing.assert_close(logits, 2 * main - other, atol=3 * TOLERANCE, rtol=0)


def test_steering_keeps_the_norm_and_turns_opposed_states_more():
    generator = torch.Generator().manual_seed(0)
    states = 3 * torch.randn(2, 5, 16, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(2, 1, 16, generator=generator), dim=-1)
    turned = steer(states, direction, 0.4)
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))
    before, after = ((x * direction).sum(-1) / x.norm(dim=-1) for x in (states, turned))
    assert (after > before).all()
    # At right angles s = 1; opposite s = 2: 1 - 2 * 0.4 of the state is left, which scaling restores.
    x, v = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(steer(x, v, 0.4), 2 * torch.tensor([1.0, 0.4]) / 1.16**0.5)
    torch.testing.assert_close(steer(-2 * v, v, 0.4), -2 * v)
    torch.testing.assert_close(steer(-2 * v, v, 0.6), 2 * v)


def test_one_head_of_the_mean_is_the_mean_of_the_heads():
    """What makes one product of six; with a bias too, for the weights of the mixture sum to 1."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 100)
    states, final = torch.randn(6, 3, 64, generator=generator), torch.randn(3, 64, generator=generator)
    with torch.no_grad():
        fused = head(0.7 * final + 0.3 * states.mean(dim=0))
        dense = 0.7 * head(final) + 0.3 * torch.stack([head(state) for state in states]).mean(dim=0)
    torch.testing.assert_close(fused, dense)


def test_strength_zero_attaches_nothing():
    zoo = build("llava")
    inputs = zoo.inputs()
    plain = logits_of(zoo, inputs)
    with lmmhooks.wrap(zoo.model, Vista(lam=0.0, gamma=0.0)) as patch:
        assert patch.attached == []
        assert torch.equal(logits_of(zoo, inputs), plain)


def test_two_prompts_in_a_row_do_not_share_directions():
    zoo = build("llava")
    first, second = zoo.inputs(seed=1), zoo.inputs(seed=2)
    with lmmhooks.wrap(zoo.model, METHOD):
        generate(zoo, first)
        after_another = logits_of(zoo, second)
    with lmmhooks.wrap(zoo.model, METHOD):
        assert torch.equal(logits_of(zoo, second), after_another)


def test_half_precision_stays_half_precision():
    zoo = build("llava", dtype=torch.bfloat16)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, METHOD):
        out = zoo.model(**inputs, output_hidden_states=True)
    assert out.logits.dtype == out.hidden_states[-1].dtype == torch.bfloat16
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, range(25, 31)), (40, range(31, 39)), (28, range(22, 27)), (4, [2]), (1, [0])]
)
def test_late_layers_follow_the_depth_and_leave_the_last_one_out(depth, layers):
    assert Vista().bind(resolve(build("llava", layers=depth).model)).sla_layers == tuple(layers)


def test_presets_name_the_published_settings():
    assert lmmhooks.methods.resolve("vista(preset='pope')").settings()["lam"] == 0.01
    assert lmmhooks.methods.resolve("vista(preset='captioning')") == Vista()


@pytest.mark.parametrize("settings", [{"lam": -0.1}, {"gamma": 1.1}, {"sla_layers": ()}, {"sla_layers": (3, 2)}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=f"vista: {next(iter(settings))}="):
        lmmhooks.method("vista", **settings)


def test_layers_the_model_lacks_are_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match=r"sla_layers must be layers in \[0, 4\)"):
        lmmhooks.wrap(build("llava").model, Vista(sla_layers=(25, 30)))
