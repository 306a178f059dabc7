"""What the tests of methods that read a prompt in several ways share: models, prompts and the comparison itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import lmmhooks
from lmmhooks.methods.decoding.base import DecodingMethod
from tests.reference.decoding import Combine, NaiveBranches, naive_generate
from tests.zoo import IMAGE

#: One of every kind of prompt: one crop, several crops, two kinds of multi-axis positions, tiles with marks.
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
}
# float32 through four layers in batches of other sizes, times weights of up to 4; largest difference seen is 2e-5.
TOLERANCE = 5e-5
STEPS = 4


def check_logits(
    zoo: Any, inputs: dict[str, Any], method: DecodingMethod, others: Sequence[dict[str, Any]], combine: Combine
) -> None:
    """Every step's logits equal those of separate forwards without cache; -inf stands where it stands there."""
    arguments = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with lmmhooks.wrap(zoo.model, method):
        # Random models say anything, and a forward over an answer with an image token would want another image.
        out = zoo.model.generate(**inputs, **arguments, suppress_tokens=[IMAGE])
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    naive = NaiveBranches(zoo.model, inputs, others, combine)
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, naive.logits(answer[:, :step]), atol=TOLERANCE, rtol=0)


def check_tokens(
    zoo: Any,
    inputs: dict[str, Any],
    method: DecodingMethod,
    others: Sequence[dict[str, Any]],
    combine: Combine,
    mode: str,
) -> None:
    """Token for token the answer of `generate` on naive logits."""
    arguments = {"max_new_tokens": STEPS, **MODES[mode]}
    torch.manual_seed(0)
    expected = naive_generate(zoo.model, inputs, others, combine, **arguments)
    with lmmhooks.wrap(zoo.model, method):
        torch.manual_seed(0)
        out = zoo.model.generate(**inputs, **arguments)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)


def lazily_the_same(zoo: Any, inputs: dict[str, Any], eager: DecodingMethod, lazy: DecodingMethod) -> None:
    """Branches on demand give the tokens of branches on every step, in every mode, and are spared some steps."""
    shares = []
    for mode in MODES.values():
        answers = []
        for method in (eager, lazy):
            torch.manual_seed(0)
            with lmmhooks.wrap(zoo.model, method) as patch:
                answers.append(zoo.model.generate(**inputs, max_new_tokens=6, **mode))
                shares.append(patch.stats.branch_steps)
        assert torch.equal(*answers)
    assert min(share for share in shares if share is not None) < 1, "a cut that never decides a step proves nothing"


def composes(zoo: Any, inputs: dict[str, Any], method: str) -> None:
    """Beside a reducer and an attention method, one row of a batch is what it is alone."""
    below = ("fastervlm(keep=4)", "var(sink_dims='any', tau=2.6, rho=0.3)")
    with lmmhooks.wrap(zoo.model, *below, method):
        both = zoo.model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        one = zoo.model.generate(**zoo.row(inputs, 1), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    assert torch.equal(both[1, -STEPS:], one[0, -STEPS:])
