"""Kinds of map on small models, against one forward with all attention matrices and dense products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.inspect.maps.flow import Flow, column_factors, flow_rows, head_weights
from lmmhooks.inspect.maps.gradient import Gradient
from lmmhooks.inspect.maps.reading import watching
from lmmhooks.inspect.maps.relative import Relative, relative
from lmmhooks.inspect.maps.relevancy import Relevancy, relevance_row, relevancy_update, rescaled
from lmmhooks.inspect.maps.rollout import Rollout, rollout_rows
from lmmhooks.methods.attention.base import AttentionMethod
from lmmhooks.methods.reduction.tvc import TVC
from tests.inspect.maps.small import ZooPasses, asked
from tests.reference import maps
from tests.zoo import FAMILIES, build

#: Values are products over layers of weights that differ in rounding; relative to the largest of a map.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def scaled_close(found, expected):
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


@pytest.fixture
def inputs():
    return build("llava").inputs()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_one_token_is_that_of_the_whole_graph(family):
    zoo = build(family)
    inputs = zoo.inputs()
    trained = [parameter.requires_grad for parameter in zoo.model.parameters()]
    with watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), rows=[0, 2], layers=[1], tokens=3)
        values = Gradient().values(question)
    assert [parameter.requires_grad for parameter in zoo.model.parameters()] == trained
    for t, row in zip(question.rows, values, strict=True):
        expected = maps.grad_att(zoo.model, inputs, list(question.answered.new_ids), t, 1)
        scaled_close(row, expected[question.positions])


def test_gradient_reads_all_its_layers_at_once(inputs):
    zoo = build("llava")
    with watching(zoo.model, None):
        passes = ZooPasses(zoo, inputs)
        both = Gradient().values(asked(passes, layers=[1, 3], tokens=2))
        each = [Gradient().values(asked(passes, layers=[layer], tokens=2)) for layer in (1, 3)]
    torch.testing.assert_close(both, torch.stack(each).mean(dim=0))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_relevancy_is_that_of_dense_updates(family):
    zoo = build(family)
    inputs = zoo.inputs()
    with watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), tokens=3)
        values = Relevancy().values(question)
        shared = Relevancy(rescale=True).values(question)
    expected = maps.relevancy(zoo.model, inputs, list(question.answered.new_ids), 2)
    for found, scaled, row in zip(values, shared, expected, strict=True):
        scaled_close(found, row[question.positions])
        # Relevance of itself is 1 and what is carried to it; the first is left out of what is shared.
        torch.testing.assert_close(scaled, row[question.positions] / (row.sum() - 1), rtol=1e-3, atol=1e-6)


def test_relevancy_without_gradient_is_the_identity():
    identity = torch.eye(5)
    assert torch.equal(relevancy_update(identity, torch.zeros(5, 5)), identity)
    assert torch.equal(rescaled(identity), identity)
    matrices = [torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)).tril() for seed in range(3)]
    dense = identity
    for matrix in matrices:
        dense = relevancy_update(dense, matrix)
    torch.testing.assert_close(relevance_row(matrices), dense[-1])
    torch.testing.assert_close((rescaled(dense) - identity).sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("regularise", ["layer", "final", "none"])
def test_flow_by_rows_is_the_dense_product(regularise):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, 12, 12, generator=generator, dtype=torch.float64)
    attention = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(dim=-1).float()
    weights = [head_weights(layer) for layer in attention]
    assert all(bool(((w > 0) & (w <= 1)).all()) for w in weights)
    matrices = [(layer * w[:, None, None]).mean(dim=0) for layer, w in zip(attention, weights, strict=True)]
    dense = maps.flow(list(attention), regularise)
    torch.testing.assert_close(flow_rows(matrices, range(12), regularise), dense)
    assert torch.equal(dense, dense.tril()), "no position sees later ones"
    nothing = [torch.diag(matrix.diag()) for matrix in matrices]
    assert torch.equal(flow_rows(nothing, [11], regularise)[0, :11], torch.zeros(11))


def test_columns_that_many_rows_see_count_less():
    factors = column_factors(7)
    assert float(factors[0]) == pytest.approx(1 / 7)
    assert float(factors[-1]) == 1.0


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_flow_and_rollout_read_the_matrices_of_prompt_and_answer(family):
    zoo = build(family)
    inputs = zoo.inputs()
    with watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), tokens=3)
        flow, rollout = Flow().values(question), Rollout().values(question)
    length, new = inputs["input_ids"].shape[1], list(question.answered.new_ids)
    attention, _ = maps.matrices(zoo.model, inputs, new)
    scaled_close(flow, maps.flow(attention, "layer")[length:][:, question.positions])
    attention, _ = maps.matrices(zoo.model, inputs, new[:-1])
    scaled_close(rollout, maps.rollout(attention)[length - 1 :][:, question.positions])


def test_rows_of_a_rollout_sum_to_one():
    matrices = [torch.rand(6, 6).tril().softmax(dim=-1) for _ in range(3)]
    torch.testing.assert_close(rollout_rows(matrices, [2, 5]).sum(dim=1), torch.ones(2))


def test_heads_can_be_chosen(inputs):
    zoo = build("llava")
    with watching(zoo.model, None):
        passes = ZooPasses(zoo, inputs)
        one = asked(passes, heads=[2], tokens=2)
        values = {kind: kind.values(one) for kind in (Gradient(), Relevancy(), Rollout(), Flow())}
        every = asked(passes, tokens=2)
        for kind, found in values.items():
            assert not torch.allclose(found, kind.values(every)), kind.id
    attention, _ = maps.matrices(zoo.model, inputs, list(one.answered.new_ids[:-1]))
    own = [layer[2:3] for layer in attention]
    scaled_close(values[Rollout()], maps.rollout(own)[-2:][:, one.positions])


def test_the_same_prompt_is_relative_to_itself_one_everywhere(inputs):
    zoo = build("llava")
    with watching(zoo.model, None):
        values = Relative().values(asked(ZooPasses(zoo, inputs), layers=[2]))
    assert torch.equal(values[0], torch.ones_like(values[0]))
    assert not torch.equal(values[1], torch.ones_like(values[1]))


def test_nothing_over_nothing_is_nothing():
    zero = torch.zeros(3)
    assert torch.equal(relative(zero, zero), zero)
    assert bool(relative(torch.ones(3), zero).isfinite().all())
    torch.testing.assert_close(relative(torch.ones(3), torch.ones(3), epsilon=1.0), torch.full((3,), 0.5))


@pytest.mark.parametrize("kind", [Gradient(), Relevancy(), Rollout(), Flow()], ids=lambda kind: kind.id)
def test_kinds_work_beside_a_reducer(kind, inputs):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, "fastv(keep=5, layer=2)"), watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), tokens=2)
        values = kind.values(question)
        late = kind.values(asked(ZooPasses(zoo, inputs), tokens=2, layers=[2, 3]))
    assert bool(values.isfinite().all())
    assert late.isnan().sum(dim=1).tolist() == [11, 11]


@dataclass(frozen=True)
class Tripled(AttentionMethod):
    """Three times the attention on one position, in place."""

    id: ClassVar[str] = "tripled"
    paper: ClassVar[str] = "none; test"

    def edit_weights(self, weights, context):
        weights[..., 9] *= 3
        return weights.div_(weights.sum(dim=-1, keepdim=True))


def test_derivatives_are_those_by_weights_after_edits(inputs):
    """Edits in place change what the softmax remembers of its result, which its derivative needs."""
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Tripled()), watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), tokens=2, layers=[1])
        values = Gradient().values(question)
        assert bool(Relevancy().values(question).isfinite().all())
    text = resolve(zoo.model)  # rows of text after the image are edited
    first = int((inputs["input_ids"][0] == text.image_token_id).nonzero()[-1]) + 1

    def tripled(weights):
        factor = torch.ones_like(weights)
        factor[:, first:, 9] = 3
        edited = weights * factor
        return edited / edited.sum(dim=-1, keepdim=True)

    for t, row in enumerate(values):
        expected = maps.grad_att(zoo.model, inputs, list(question.answered.new_ids), t, 1, tripled)
        scaled_close(row, expected[question.positions])


def test_answers_with_inserted_images_have_rows_but_no_matrices(inputs):
    zoo = build("llava")
    method = TVC(trigger="every", every=2, bridge=(9, 10), pooling=2)
    with lmmhooks.wrap(zoo.model, method), watching(zoo.model, None):
        passes = ZooPasses(zoo, inputs)
        question = asked(passes, tokens=5)
        assert bool(question.mean_rows().isfinite().all())
        spans = question.answered.stacked("spans", 4)
        torch.testing.assert_close(spans.sum(dim=-1), torch.ones(5, 4), rtol=0, atol=1e-5)
        for kind in (Relevancy(), Rollout(), Flow()):
            with pytest.raises(lmmhooks.PromptError, match="inserts tokens into the answer"):
                kind.values(question)
            kind.values(asked(passes, tokens=1))


@pytest.mark.parametrize("kind", [Gradient(), Relevancy()], ids=lambda kind: kind.id)
def test_derivatives_are_refused_beside_branches(kind, inputs):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, "vcd"), watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), tokens=2)
        with pytest.raises(lmmhooks.PromptError, match="vcd combines several"):
            kind.values(question)


def test_whole_matrices_of_long_prompts_are_refused(inputs, monkeypatch):
    monkeypatch.setattr("lmmhooks.inspect.maps.reading.MAX_POSITIONS", 20)
    zoo = build("llava")
    with watching(zoo.model, None):
        question = asked(ZooPasses(zoo, inputs), tokens=1)
        for kind in (Relevancy(), Rollout(), Flow()):
            with pytest.raises(lmmhooks.PromptError, match="up to 20 positions"):
                kind.values(question)
