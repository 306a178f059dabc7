"""Reducers that exist only in tests, their naive counterparts, and the comparison of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.base import Cut, ReductionMethod
from tests.reference.reduction import best, keep_only, reduced_logits

# float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5
STEPS = 3
MROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


@dataclass(frozen=True)
class ByNorm(ReductionMethod):
    """Keeps the states of largest norm: a choice that depends on what the layers before made of the tokens."""

    id: ClassVar[str] = "test-by-norm"

    layers: tuple[int, ...] = (0,)
    shares: tuple[float, ...] = (0.5,)
    hide: bool = False
    descending: bool = False
    average: bool = False
    newline: str = "rank"

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(layer, keep, self.hide) for layer, keep in zip(self.layers, self.shares, strict=True)]

    def select(self, tokens):
        index = tokens.states.norm(dim=-1).sort(dim=-1, descending=True, stable=True).indices[:, : tokens.num_keep]
        return index if self.descending else index.sort(dim=-1).values

    def merge(self, tokens, index):
        if not self.average:
            return None
        kept = tokens.states.gather(1, index[..., None].expand(-1, -1, tokens.states.shape[-1]))
        return (kept + tokens.states.mean(dim=1, keepdim=True)) / 2


def naive_by_norm(groups: list[list[int]], share: float, descending: bool = False, average: bool = False):
    """The same for tokens given by their number in the row; shares are of the tokens the group began with."""

    def choose(alive, attention, prompt):
        by_number = {token.number: token for token in alive}
        for group in groups:
            norms = {n: float(by_number[n].state.norm()) for n in group if n in by_number}
            stay = best(norms, max(1, int(share * len(group))))
            if descending:
                stay = sorted(stay, key=lambda n: -norms[n])
            if average:
                mean = torch.stack([by_number[n].state for n in norms]).mean(dim=0)
                for n in stay:
                    by_number[n].state = (by_number[n].state + mean) / 2
            alive = keep_only(set(group), stay)(alive, attention, prompt)
        return alive

    return choose


def visual_groups(model, inputs, row: int) -> list[list[int]]:
    """Per image, the numbers its tokens have among the row's tokens without padding."""
    with torch.no_grad(), lmmhooks.wrap(model, "reduction-identity"):
        model(**inputs)
        layout = find_runtime(model).last.layout
    number = layout.valid[row].long().cumsum(dim=0) - 1
    return [number[span.positions].tolist() for span in layout.spans_of(row)]


def check(zoo, eager, inputs, method, naive, renumber):
    """Prefill logits at every position and logits of the following steps, all rows, against the naive decoder."""
    with lmmhooks.wrap(zoo.model, method):
        with torch.no_grad():
            logits = zoo.model(**inputs).logits
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    assert logits.shape[1] == length
    answer = out.sequences[:, length:]
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
    assert (logits[:, -1] - plain[:, -1]).abs().max() > 1e-2, "a reduction that changes nothing proves nothing"
    for row in range(len(logits)):
        groups = visual_groups(eager.model, inputs, row)
        cuts = {layer: (naive(layer, groups), renumber) for layer in method.layers}
        expected = reduced_logits(eager.model, inputs, row, cuts)
        valid = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, valid], expected, atol=TOLERANCE, rtol=0)
        steps = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-STEPS:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], steps, atol=TOLERANCE, rtol=0)
