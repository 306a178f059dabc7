"""Visual and textual intervention against its naive rendering, and how its directions are estimated."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from torch import nn

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.attention.directions import principal_shift, textual_direction, visual_direction
from lmmhooks.methods.attention.vti import Vti, steer
from lmmhooks.methods.tensors import TensorSet
from tests.reference import vti as naive
from tests.reference.attention import full_logits
from tests.zoo import build

# float32 through four layers in another summation order; largest difference seen is 3.4e-6.
TOLERANCE = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlps(model):
    family = resolve(model)
    return [family.mlp_of(layer) for layer in family.layers], [family.mlp_of(layer) for layer in family.vision_layers]


def directions(model, tokens: int) -> TensorSet:
    decoder, tower = mlps(model)
    (*_, last) = (module for module in tower[0].modules() if isinstance(module, nn.Linear))
    width = model.model.language_model.config.hidden_size
    return TensorSet(
        {"textual": random(len(decoder), width), "visual": random(len(tower), tokens, last.out_features, seed=1)}
    )


# 17 positions are the 16 patches and the class token of the CLIP and InternVL towers: a direction for each of them.
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_equals_the_naive_rendering_at_prefill_and_decode(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    assert not inputs["attention_mask"].all()
    given = directions(zoo.model, tokens=17)
    steps = 3
    with lmmhooks.wrap(zoo.model, Vti(lam_text=2.0, lam_image=3.0, directions=given)):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -steps:]
    decoder, tower = mlps(zoo.model)
    with naive.steered_mlps(decoder, tower, given["textual"], given["visual"], 0.2, 0.3):
        expected = full_logits(zoo.model, inputs, answer[:, :-1])[:, -steps:]
    assert (expected - plain).abs().max() > 1e-2, "settings under which nothing is edited prove nothing"
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=TOLERANCE, rtol=0)


def test_every_position_of_a_tower_of_fixed_length_has_its_own_direction():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    given = directions(zoo.model, tokens=17)
    mean = TensorSet({**given, "visual": given["visual"].mean(dim=1, keepdim=True)})

    def logits(directions):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, Vti(lam_text=0.0, lam_image=5.0, directions=directions)):
            return zoo.model(**inputs).logits

    assert (logits(given) - logits(mean)).abs().max() > 1e-2


def test_length_stays_and_strength_zero_changes_nothing():
    x, d = random(2, 5, 64), random(64, seed=1)
    torch.testing.assert_close(steer(x, d, 0.3).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(steer(x, d, 0.0), x)
    # The cosine to the direction grows, most where it was smallest.
    before, after = (torch.cosine_similarity(v, d.expand_as(v), dim=-1) for v in (x, steer(x, d, 0.3)))
    assert (after > before).all()
    half = x.to(torch.bfloat16)
    assert steer(half, d, 0.3).dtype == torch.bfloat16
    assert torch.isfinite(steer(torch.zeros(1, 64), d, 0.3)).all()


def test_shift_is_the_mean_plus_the_signed_first_component():
    x = random(7, 40)
    expected = naive.shift(x.double().numpy())
    np.testing.assert_allclose(principal_shift(x).numpy(), expected, atol=1e-5)
    component = principal_shift(x) - x.mean(dim=0)
    torch.testing.assert_close(component.norm(), torch.tensor(1.0))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(principal_shift(x[order]), principal_shift(x), atol=1e-5, rtol=0)


def test_equal_shifts_have_no_component():
    x = random(1, 40).expand(5, -1) * 3
    torch.testing.assert_close(principal_shift(x), x[0])


@pytest.mark.parametrize("grouping", ["released", "token"])
def test_visual_direction_equals_loops_over_groups(grouping):
    x = random(6, 4, 5, 3)
    expected = naive.visual(x.double().numpy(), grouping == "released")
    found = visual_direction(x, grouping)
    assert found.shape == (3, 5, 3)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_groupings_differ_in_the_component_alone():
    x = random(6, 4, 5, 3)
    both = [visual_direction(x, grouping) - x.mean(dim=0)[1:] for grouping in ("released", "token")]
    assert (both[0] - both[1]).abs().max() > 0.1
    averaged = x.mean(dim=2, keepdim=True)
    torch.testing.assert_close(visual_direction(averaged, "released"), visual_direction(averaged, "token"))


def test_textual_direction_is_one_group_over_all_layers():
    x = random(6, 5, 8)
    expected = naive.shift(x.double().flatten(1).numpy()).reshape(5, 8)[1:]
    np.testing.assert_allclose(textual_direction(x).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{"lam_image": 0.0, "lam_text": 0.0}, {"factor": 0.0}])
def test_strength_zero_attaches_nothing_and_needs_no_directions(settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Vti(**settings)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_a_part_of_strength_zero_is_left_alone():
    zoo = build("llava")
    given = directions(zoo.model, tokens=1)
    with lmmhooks.wrap(zoo.model, Vti(lam_image=0.0, directions=TensorSet({"textual": given["textual"]}))) as patch:
        assert not [name for name in patch.attached if "MLP of vision" in name]
        assert [name for name in patch.attached if "MLP of decoder" in name]
    with lmmhooks.wrap(zoo.model, Vti(lam_text=0.0, directions=TensorSet({"visual": given["visual"]}))) as patch:
        assert [name for name in patch.attached if "MLP of vision" in name]
        assert not [name for name in patch.attached if "MLP of decoder" in name]


@pytest.mark.parametrize("other", ["fastervlm(keep=4)", "random(keep=4)", "vcd(beta=0.0)"])
def test_composes(other):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    given = directions(zoo.model, tokens=17)

    def logits(inputs):
        return zoo.model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits  # fmt: skip

    with lmmhooks.wrap(zoo.model, other):
        without = logits(inputs)
    with lmmhooks.wrap(zoo.model, other, Vti(directions=given)):
        together, single = logits(inputs), logits(zoo.row(inputs, 0))
    assert (together[0] - without[0]).abs().max() > 1e-3
    torch.testing.assert_close(together[2][:1], single[2], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"lam_image": -0.1}, {"lam_text": -1}, {"factor": -0.1}, {"directions": "x.pt"}, {"directions": [1]}]
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("vti", **settings)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"visual": (3, 1, 32)}, r"'textual' has shape \[4, 64\]"),
        ({"textual": (4, 64)}, r"'visual' has shape \[3, tokens, width\]"),
        ({"textual": (5, 64), "visual": (3, 1, 32)}, r"'textual' has shape \[4, 64\]"),
        ({"textual": (4, 64), "visual": (2, 1, 32)}, r"'visual' has shape \[3, tokens, width\]"),
    ],
)
def test_directions_that_are_missing_or_of_another_model_are_refused(tensors, message):
    given = TensorSet({name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(lmmhooks.MethodError, match=message):
        lmmhooks.wrap(build("llava").model, Vti(directions=given))


def test_without_a_record_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    model = build("llava").model
    with pytest.raises(lmmhooks.MethodError, match="`lmmhooks calibrate vti --model FOLDER --dtype float32`"):
        lmmhooks.wrap(model, "vti")
    assert not model._forward_pre_hooks


def test_the_content_of_directions_counts_in_the_settings():
    one, same, other = (TensorSet({"textual": random(4, 64, seed=seed)}) for seed in (0, 0, 1))
    assert Vti(directions=one) == Vti(directions=same) != Vti(directions=other)
    assert Vti(directions=one).settings()["directions"]["shapes"] == {"textual": [4, 64]}
    assert Vti(directions=one).settings() == Vti(directions=same).settings() != Vti(directions=other).settings()
