"""ReVisiT against its naive rendering, and the invariants of its choice of a visual token."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding import revisit as module
from lmmhooks.methods.decoding.base import plausible
from lmmhooks.methods.decoding.revisit import Revisit, picked
from tests.methods.layerwise import (
    MODES,
    check_composes,
    check_half_precision,
    check_logits,
    check_one_pass,
    check_other_loops,
    check_tokens,
    wrapped,
)
from tests.reference.layers import revisit
from tests.zoo import build

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
LAYERS, BETA = (0, 3, 4), 0.02
METHOD = Revisit(layers=LAYERS, beta=BETA)
RULE = revisit(LAYERS, BETA)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_naive_rendering(family):
    check_logits(family, METHOD, RULE)


@pytest.mark.parametrize("beta", [0.0, 1e-5, 0.3])
def test_any_cut(beta):
    check_logits("llava", Revisit(layers="last", beta=beta), revisit((4,), beta))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, mode, METHOD, RULE)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_composes(family):
    check_composes(family, METHOD)


def test_without_cache_with_drafts_and_in_half_precision():
    check_other_loops(Revisit(layers=LAYERS, beta=0.0))
    check_half_precision(METHOD)


def test_one_forward_per_step():
    check_one_pass(METHOD)


def test_blocks_of_candidates_are_all_candidates(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 700)
    check_logits("llava", METHOD, RULE)


def test_a_row_without_an_image_stays_as_it_is():
    check_logits("llava", METHOD, RULE, images=[0, 1])
    zoo = build("llava")
    for images in ([0, 1], [0, 0]):
        inputs = zoo.inputs(batch=2, images=images)
        plain, out = (wrapped(zoo, inputs, method) for method in ("decoding-identity", METHOD))
        # Row by row the same numbers, for the batch is the same.
        assert torch.equal(torch.stack(plain.logits)[:, 0], torch.stack(out.logits)[:, 0])


def test_one_plausible_token_is_greedy_decoding():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = zoo.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with lmmhooks.wrap(zoo.model, Revisit(beta=1.0)):
        torch.manual_seed(0)
        assert torch.equal(zoo.model.generate(**inputs, max_new_tokens=3, do_sample=True), plain)


def test_finite_where_plausible_and_nowhere_else():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    plain = wrapped(zoo, inputs, "decoding-identity", steps=1).logits[0]
    out = wrapped(zoo, inputs, METHOD, steps=1).logits[0]
    assert torch.equal(out.isfinite(), plausible(plain, BETA))


def test_nothing_of_a_prompt_reaches_the_next():
    zoo = build("llava")
    first, second = zoo.inputs(batch=2), zoo.inputs(batch=1, images=2, seed=1)
    alone = wrapped(zoo, second, METHOD)
    with lmmhooks.wrap(zoo.model, METHOD):
        zoo.model.generate(**first, max_new_tokens=2, do_sample=False)
        after = zoo.model.generate(
            **second, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert torch.equal(torch.stack(alone.logits), torch.stack(after.logits))


def test_identical_candidates_give_the_answer_of_one():
    zoo = build("llava")
    inputs = zoo.inputs()
    family_logits = []

    class View:
        def __init__(self, copies):
            state = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
            self.visual, self.is_visual = {4: state.expand(1, copies, 64)}, {4: torch.ones(1, copies, dtype=torch.bool)}

    with lmmhooks.wrap(zoo.model, Revisit(layers=(4,))) as patch, torch.no_grad():
        main = zoo.model(**inputs).logits[:, -1]
        for copies in (1, 7):
            view = View(copies)
            view.family = patch.family
            family_logits.append(Revisit(layers=(4,), beta=0.0).combine(main.clamp(min=-50), [], 0, view))
    torch.testing.assert_close(*family_logits, atol=1e-5, rtol=0)


def test_candidates_are_counted_through_the_layers():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(5, size, 3, generator=generator) for size in (4, 1, 2)]
    index = torch.tensor([0, 3, 4, 5, 6])
    assert torch.equal(picked(states, index), torch.cat(states, dim=1)[torch.arange(5), index])


def test_rows_of_the_head_alone_are_those_of_the_whole_head():
    family = lmmhooks.family.resolve(build("llava").model)
    states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([5, 90, 7])
    torch.testing.assert_close(family.token_logits(states, tokens), family.token_logits(states)[..., tokens])

    class Other(torch.nn.Linear):
        """A head of which rows cannot be taken: quantised ones, say."""

    other = Other(64, 128, bias=False)
    other.load_state_dict(family.lm_head.state_dict())
    family.lm_head = other
    torch.testing.assert_close(family.token_logits(states, tokens), family.token_logits(states)[..., tokens])


@pytest.mark.parametrize(("family", "layers"), [("llava", (4,)), ("qwen2_5_vl", (0, 2, 4)), ("internvl", (4,))])
def test_published_layers(family, layers):
    with lmmhooks.wrap(build(family).model, "revisit") as patch:
        assert patch.methods[0].layers == layers
    with lmmhooks.wrap(build(family).model, "revisit(layers='high')") as patch:
        assert patch.methods[0].layers == (2,)


@pytest.mark.parametrize(("settings", "name"), [({"layers": "first"}, "layers"), ({"beta": -1.0}, "beta")])
def test_settings_out_of_range_are_refused(settings, name):
    with pytest.raises(MethodError, match=f"revisit: {name}="):
        Revisit(**settings)


@pytest.mark.parametrize("layers", [(), (0, 5), (-1,)])
def test_layers_the_model_does_not_have_are_refused(layers):
    with pytest.raises(MethodError, match=r"layers must be in 0 \.\.\. 4"):
        lmmhooks.wrap(build("llava").model, Revisit(layers=layers))


def test_there_is_nothing_to_be_lazy_about():
    with pytest.raises(MethodError, match="no hyper-parameter 'lazy'"):
        lmmhooks.method("revisit", lazy=True)
