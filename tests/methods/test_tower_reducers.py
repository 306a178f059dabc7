"""What reducers that score in the vision tower have in common: companions, rows without images, nothing to remove."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from tests.zoo import build

SPECS = (
    "vtc-cls(keep=5, start=0)",
    "hiprune(keep=5, alpha=0.8)",
    "hired(keep=5)",
    "visionzip(keep=5, contextual=2)",
    "prumerge(plus=True)",
    "vispruner(keep=5, step=2)",
)
FAMILIES = ("llava", "llava_next", "qwen3_vl")
# Batched against single rows and branches against plain rows: other orders of summation.
TOLERANCE = 2e-5


def generate(model, inputs):
    out = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("companion", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_companions_act_on_what_is_left(spec, family, companion):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, spec):
        alone = generate(zoo.model, inputs)
        kept = find_runtime(zoo.model).last.stages[0].index
    with lmmhooks.wrap(zoo.model, companion):
        other = generate(zoo.model, inputs)
    with lmmhooks.wrap(zoo.model, spec, companion):
        both = generate(zoo.model, inputs)
        if not companion.startswith("vcd"):  # whose branch rows see other tokens
            assert torch.equal(find_runtime(zoo.model).last.stages[0].index, kept)
        single = generate(zoo.model, zoo.row(inputs, 1))
    assert torch.isfinite(both).all()
    assert not torch.equal(both, alone)
    assert not torch.equal(both, other)
    torch.testing.assert_close(both[1:], single, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_row_without_an_image_answers_as_if_nothing_had_been_attached(spec, family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[1, 0])
    plain = generate(zoo.model, inputs)
    with lmmhooks.wrap(zoo.model, spec):
        reduced = generate(zoo.model, inputs)
    torch.testing.assert_close(reduced[1], plain[1], atol=TOLERANCE, rtol=0)
    assert (reduced[0] - plain[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_of_text_is_left_alone(spec, family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=0)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, spec):
            assert torch.equal(zoo.model(**inputs).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [spec.split("(")[0] for spec in SPECS])
def test_keeping_everything_is_bit_identical(name, family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, f"{name}(keep=1.0)") as patch:
        assert patch.attached == []
    most = 16 if family == "llava" else 10000
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, f"{name}(keep={most})"):
            assert torch.equal(zoo.model(**inputs).logits, plain)


@pytest.mark.parametrize("name", [spec.split("(")[0] for spec in SPECS])
def test_budgets_are_met_exactly(name):
    zoo = build("llava_next")
    inputs = zoo.inputs(batch=2)
    settings = ", exact_budget=True" if name == "hired" else ""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, f"{name}(budget=9{settings})") as patch:
        zoo.model(**inputs)
        assert [layer.visual_kept for layer in patch.stats.layers] == [(9, 9)] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_half_precision(spec, dtype):
    for family in ("llava", "qwen2_5_vl"):
        zoo = build(family, dtype=dtype)
        with torch.no_grad(), lmmhooks.wrap(zoo.model, spec):
            assert torch.isfinite(zoo.model(**zoo.inputs(batch=2)).logits).all()
