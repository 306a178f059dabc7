"""Guidance by the prompt without image against separate forwards, in every loop of generate."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.pai_guidance import PaiGuidance
from tests.methods.boosts import generated
from tests.reference.boosts import guided
from tests.reference.decoding import NaiveBranches, naive_generate, without_image
from tests.zoo import FAMILIES, build

# float32 through four layers in other batches, weighted with 1.5 and -0.5; largest difference seen is 5e-6.
TOLERANCE = 1e-5
GAMMA, CUT = 1.5, 0.02


def combine(main, others, step):
    return guided(main, others[0], GAMMA, CUT)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_forwards_at_prefill_and_decode(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    others = [without_image(inputs, resolve(zoo.model).visual_ids)]
    with lmmhooks.wrap(zoo.model, PaiGuidance(gamma=GAMMA, beta=CUT)):
        answer, logits = generated(zoo, inputs, 3)
    naive = NaiveBranches(zoo.model, inputs, others, combine)
    for step in range(3):
        # Raw logits are combined, which are log-probabilities up to a constant per row.
        actual = logits[:, step].log_softmax(-1)
        torch.testing.assert_close(actual, naive.logits(answer[:, :step]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "mode",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_generates_the_tokens_of_the_naive_rendering(mode):
    """Beams too, each guided by its own text: the release leaves the cache of the other reading where it was."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    others = [without_image(inputs, resolve(zoo.model).visual_ids)]
    torch.manual_seed(0)
    expected = naive_generate(zoo.model, inputs, others, combine, max_new_tokens=5, **mode)
    torch.manual_seed(0)
    plain = zoo.model.generate(**inputs, max_new_tokens=5, **mode)[:, inputs["input_ids"].shape[1] :]
    with lmmhooks.wrap(zoo.model, PaiGuidance(gamma=GAMMA, beta=CUT)):
        torch.manual_seed(0)
        out = zoo.model.generate(**inputs, max_new_tokens=5, **mode)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(out, expected)
    assert not torch.equal(out, plain), "guidance that changes no token proves nothing"


def test_dropped_tokens_are_those_of_the_formula():
    main, text = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1)) * 3
    out = PaiGuidance(gamma=1.1).combine(main, [text], step=0, view=None)
    c = main.log_softmax(-1)
    assert torch.equal(out == -math.inf, c < math.log(0.1) + c.amax(-1, keepdim=True))
    assert (out == -math.inf).any()


def test_gamma_one_leaves_the_model_as_it_is_whatever_the_cut():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, PaiGuidance(gamma=1.0, beta=0.5)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_one_forward_per_step():
    zoo = build("llava")
    calls = []
    hook = zoo.model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with lmmhooks.wrap(zoo.model, PaiGuidance()):
        generated(zoo, zoo.inputs(batch=2), 3)
    hook.remove()
    # The prompt without its image is short, and read by itself.
    assert len(calls) == 1 + 3


@pytest.mark.parametrize(
    ("settings", "name"), [({"gamma": -0.5}, "gamma"), ({"beta": 1.5}, "beta"), ({"beta": 0.0, "lazy": True}, "lazy")]
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(MethodError, match=f"pai-guidance: {name}="):
        PaiGuidance(**settings)
