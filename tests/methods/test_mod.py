"""Mixture of decoding against separate passes with blanked embeddings, its gate, and its formula."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.mod import Mod, divergence, most_attended
from tests.methods.shown import FAMILIES, TOLERANCE, check_logits, check_tokens, inputs_of
from tests.reference.branch_features import (
    MixtureOfDecoding,
    NaiveRows,
    attended,
    blanked,
    changed,
    image_runs,
    jensen_shannon,
    of_image,
    prompt_attention,
)
from tests.zoo import IMAGE, build

ADD, SUBTRACT, BETA = 4.0, 1.0, 0.02


def rendering(tau):
    def render(eager, inputs):
        attention = prompt_attention(eager.model, inputs)
        changes = []
        for row in range(2):
            runs = image_runs(inputs["input_ids"][row], inputs["attention_mask"][row], IMAGE)
            keep = set()
            for run in runs:
                keep |= {run[j] for j in attended(of_image(attention, inputs["attention_mask"], row, run), 0.2)}
            changes.append(blanked(keep, runs))
        combine = MixtureOfDecoding(ADD, SUBTRACT, tau, BETA)
        return NaiveRows(eager.model, inputs, [changed(eager.model, inputs, changes)], combine)

    return render


def gap(family):
    """A threshold between the divergences of the two rows, so that one adds and the other subtracts."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = inputs_of(zoo)
    naive = rendering(0.0)(eager, inputs)
    with torch.no_grad():
        main = zoo.model(**inputs).logits[:, -1]
        found = [jensen_shannon(main[row], naive.branches[0](row, main[:, :0].long())) for row in range(2)]
    assert abs(found[0] - found[1]) > 1e-4
    return sum(found) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_passes_at_prefill_and_decode(family):
    tau = gap(family)
    check_logits(family, Mod(beta=BETA, tau=tau), rendering(tau))


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    tau = gap(family)
    check_tokens(family, Mod(beta=BETA, tau=tau), rendering(tau), mode)


@pytest.mark.parametrize("tau", [0.0, 10.0])
def test_beams_generate_the_tokens_of_the_naive_rendering(tau):
    check_tokens("llava", Mod(beta=BETA, tau=tau), rendering(tau), "beams")


@pytest.mark.parametrize("below", [(), ("var(sink_dims='any')",)], ids=["joined", "apart"])
def test_the_choice_goes_with_its_row_in_beam_search(below):
    """Rows of a batch choose differently, and each beams as it does alone."""
    zoo = build("llava")
    inputs = inputs_of(zoo)
    kwargs = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with lmmhooks.wrap(zoo.model, *below, Mod(beta=BETA, tau=gap("llava"))):
        both = zoo.model.generate(**inputs, **kwargs)
        for row in range(2):
            one = zoo.model.generate(**zoo.row(inputs, row), **kwargs)
            assert torch.equal(both[row, -4:], one[0, -4:])


def test_divergence():
    generator = torch.Generator().manual_seed(0)
    main, other = torch.randn(2, 6, 40, generator=generator) * 3
    expected = torch.tensor([jensen_shannon(p, q) for p, q in zip(main, other, strict=True)])
    # Sums of 40 float32 terms up to 0.3.
    torch.testing.assert_close(divergence(main, other)[:, 0], expected, atol=1e-6, rtol=0)
    assert torch.equal(divergence(main, main), torch.zeros(6, 1))


def test_least_attended_tokens_go():
    attention = torch.tensor([[0.1, 0.3, 0.1, 0.2, 0.3], [0.1, 0.0, 0.1, 0.0, 0.1]])
    assert most_attended(attention, 0.2).tolist() == [False, False, False, False, True]
    assert most_attended(attention, 0.6).tolist() == [False, True, False, True, True]
    assert most_attended(attention, 1.0).all()
    assert most_attended(torch.zeros(3, 10), 0.2).tolist() == [False] * 8 + [True] * 2


def test_with_all_tokens_kept_the_sum_is_a_temperature():
    zoo = build("llava")
    inputs = inputs_of(zoo)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Mod(share=1.0, beta=0.0)):
            summed = zoo.model(**inputs).logits[:, -1]
    torch.testing.assert_close(summed, 5 * plain, atol=TOLERANCE, rtol=0)
    assert Mod(alpha_add=0, alpha_subtract=0, beta=0).is_identity


@pytest.mark.parametrize(
    "settings", [{"alpha_add": -1}, {"alpha_subtract": -1}, {"tau": -0.1}, {"share": 1.5}, {"lazy": True}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        Mod(**settings)
