"""What is read while a model answers: rows against the eager ones, on every family, without changing anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.inspect.maps.reading import GREEDY, watching
from lmmhooks.inspect.maps.rollout import Rollout
from lmmhooks.layout import Segment
from lmmhooks.methods.attention.base import AttentionMethod
from tests.inspect.maps.small import ZooPasses, asked
from tests.reference.maps import matrices
from tests.zoo import FAMILIES, build

#: Explicit rows and the eager matrix differ by the order of summation; float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class AllOnOne(AttentionMethod):
    """Every edited row looks at one position and nowhere else."""

    position: int = 0
    id: ClassVar[str] = "all-on-one"
    paper: ClassVar[str] = "none; test"

    def edit_weights(self, weights, context):
        edited = torch.zeros_like(weights)
        edited[..., self.position] = 1.0
        return edited


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_the_eager_model(family):
    zoo = build(family)
    inputs = zoo.inputs()
    with watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), keep_heads=True)
        within = asked(ZooPasses(zoo, inputs), within=True).mean_rows()
    answered = question.answered
    attention, logits = matrices(zoo.model, inputs, list(answered.new_ids[:-1]))
    first = inputs["input_ids"].shape[1] - 1
    rows = torch.stack([layer[:, first:].detach() for layer in attention]).permute(2, 0, 1, 3)
    visual = rows[..., question.positions]
    torch.testing.assert_close(question.mean_rows(), visual.mean(dim=(1, 2)), **CLOSE)
    torch.testing.assert_close(within, (visual / visual.sum(dim=-1, keepdim=True)).mean(dim=(1, 2)), **CLOSE)
    by_head = torch.stack([torch.stack([row[layer].by_head for layer in row]) for row in answered.rows])
    # Half precision: 11 bits.
    torch.testing.assert_close(by_head.float(), visual, rtol=1e-3, atol=1e-4)
    mean = visual.mean(dim=2)
    share = mean / mean.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(answered.stacked("entropy", 4), -(share * share.log()).sum(dim=-1), **CLOSE)
    chance = logits[first:].detach().log_softmax(dim=-1).exp()
    own = chance.gather(1, torch.tensor(answered.new_ids)[:, None])[:, 0]
    torch.testing.assert_close(answered.probabilities, own, **CLOSE)
    assert answered.ranks.tolist() == [1] * len(answered.new_ids)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_spans_share_out_the_row(family):
    zoo = build(family)
    inputs = zoo.inputs()
    with watching(zoo.model, None):
        answered = asked(ZooPasses(zoo, inputs)).answered
    spans = answered.stacked("spans", 4)
    torch.testing.assert_close(spans.sum(dim=-1), torch.ones(spans.shape[:2]), rtol=0, atol=1e-5)
    assert torch.equal(spans[0, :, 3], torch.zeros(4)), "nothing was generated before the first token"
    assert bool((spans[1:, :, 3] > 0).all())
    attention, _ = matrices(zoo.model, inputs, list(answered.new_ids[:-1]))
    segment = answered.layout.segment[0]
    last = attention[2][:, -1].mean(dim=0).detach()
    for place, kind in enumerate((Segment.SYSTEM, Segment.VISUAL, Segment.INSTRUCTION)):
        expected = last[: len(segment)][segment == kind].sum()
        torch.testing.assert_close(spans[-1, 2, place], expected, **CLOSE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_reading_changes_nothing(family):
    zoo = build(family)
    inputs = zoo.inputs()
    zoo.model.generation_config.eos_token_id = None
    settings = {**GREEDY, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    zoo.model(**inputs, output_hidden_states=True)  # transformers installs hooks of its own at the first request
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in zoo.model.modules())
    before = zoo.model.generate(**inputs, **settings)
    with watching(zoo.model, None):
        answered = asked(ZooPasses(zoo, inputs), states=True).answered
    assert find_runtime(zoo.model) is None
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in zoo.model.modules()) == hooks
    after = zoo.model.generate(**inputs, **settings)
    new = before.sequences[0, inputs["input_ids"].shape[1] :]
    assert answered.new_ids == tuple(new.tolist())
    chances = torch.stack(before.logits)[:, 0].softmax(dim=-1).gather(1, new[:, None])[:, 0]
    assert torch.equal(answered.probabilities, chances)
    assert all(torch.equal(one, other) for one, other in zip(before.logits, after.logits, strict=True))


def test_rows_come_after_the_edits_of_methods():
    zoo = build("llava")
    inputs = zoo.inputs()
    with lmmhooks.wrap(zoo.model, AllOnOne(position=7)), watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs))
        values = question.mean_rows()
    one = torch.zeros_like(values)
    one[:, question.positions == 7] = 1.0
    assert torch.equal(values, one)
    assert torch.equal(question.answered.stacked("entropy", 4), torch.zeros(4, 4))


def test_removed_tokens_have_no_value():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, "fastv(keep=5, layer=2)"), watching(zoo.model, None):
        question = asked(ZooPasses(zoo, zoo.inputs()))
        late = asked(ZooPasses(zoo, zoo.inputs()), layers=[2, 3])
        values = question.mean_rows()
        gone = late.mean_rows().isnan()
    shares = question.answered.stacked("share", 4)
    assert (~shares[0].isnan()).sum(dim=1).tolist() == [16, 16, 5, 5]
    assert not bool(values.isnan().any()), "the first layers see all tokens"
    assert gone.sum(dim=1).tolist() == [11] * 4
    # Absent from half of the layers: half of the mean of the others.
    expected = shares[:, :2].mean(dim=1) / 2
    torch.testing.assert_close(values[gone], expected[gone])


def test_branches_are_told_apart():
    zoo = build("llava")
    inputs = zoo.inputs()
    with watching(zoo.model, None):
        plain = asked(ZooPasses(zoo, inputs), tokens=1)
        alone = plain.mean_rows()
    with lmmhooks.wrap(zoo.model, "vcd"), watching(zoo.model, None):
        torch.testing.assert_close(asked(ZooPasses(zoo, inputs), tokens=1).mean_rows(), alone, **CLOSE)


def test_compressed_caches_are_refused_where_positions_are_unknown():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, "look-m"), watching(zoo.model, None):
        passes = ZooPasses(zoo, zoo.inputs())
        assert len(asked(passes, tokens=1).answered.rows) == 1
        question = asked(passes, tokens=3, rows=[0])
        assert [len(row) for row in question.answered.rows] == [4, 0, 0]
        assert bool(question.mean_rows().isfinite().all())
        with pytest.raises(lmmhooks.PromptError, match="attention of token 1 of the answer could not be read"):
            question.mean_rows(rows=[0, 1])
        with pytest.raises(lmmhooks.PromptError, match=r"cache of decoder layer . was compressed"):
            Rollout().values(asked(passes, tokens=3))


def test_an_even_row_has_the_entropy_of_its_length():
    from lmmhooks.inspect.maps.measures import entropy

    torch.testing.assert_close(entropy(torch.full((3, 16), 0.01)), torch.full((3,), math.log(16)))
    assert float(entropy(torch.zeros(16))) == 0.0
    assert float(entropy(torch.tensor([0.2, math.nan, 0.2]))) == pytest.approx(math.log(2))
