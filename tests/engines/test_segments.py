"""Segments reweighted without the attention matrix, against explicit weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lmmhooks
from lmmhooks.engines import segments
from lmmhooks.engines.backend import AttentionCall
from lmmhooks.engines.editing import Edit
from lmmhooks.engines.rows import visible, visible_keys
from lmmhooks.engines.segments import SegmentCall
from lmmhooks.methods.attention.base import SegmentMethod
from tests.zoo import FAMILIES, build

# float32, sums in another order; largest difference seen is 3e-6.
TOLERANCE = 1e-5
LENGTH = 23
MASKS = ("causal", "left padding", "right padding", "dense bool", "dense additive")


@dataclass(frozen=True)
class Damp(SegmentMethod):
    """Quarters the keys of each head that receive most, the first one too, and fills up the others."""

    id: ClassVar[str] = "test-damp"
    listed: tuple[int, ...] | None = None
    most: int = 3

    def edited_heads(self, layer, family):
        return self.listed

    def choose(self, received, seen, context):
        index = received.masked_fill(seen[:, None] == 0, -1).topk(self.most, dim=-1).indices
        # Heads differ in how many keys they choose.
        index[:, 0] = index[:, 0, :1]
        return torch.zeros_like(received, dtype=torch.bool).scatter_(-1, index, True) & (seen > 0)[:, None]

    def factors(self, mass, rest):
        movable = rest > 0
        return torch.where(movable, 0.25, 1.0), torch.where(movable, 1 + 0.75 * mass / rest.clamp_min(1e-30), 1.0)


@dataclass
class Case:
    """Random states under one kind of mask; ``may [B, N, N]`` says which row sees which key, padded rows nothing."""

    call: AttentionCall
    valid: torch.Tensor
    padded: bool
    may: torch.Tensor

    def segments(self, heads):
        valid = self.valid if self.padded else None
        mask, length = self.call.dense_mask, self.valid.shape[1]
        return SegmentCall(
            self.call,
            self.call.key,
            self.call.value,
            heads,
            lambda rows: visible(mask, rows, length, length, valid, causal=True),
            lambda keys: visible_keys(mask, keys, length, length, valid),
        )

    def dense(self, heads):
        """Weights and values per edited head, in float64."""
        groups = self.call.query.shape[1] // self.call.key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1).double() for x in (self.call.key, self.call.value))
        scores = self.call.query.double() @ key.transpose(2, 3) * self.call.scaling
        if (cap := self.call.kwargs.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        weights = torch.softmax(scores.masked_fill(~self.may[:, None], -torch.inf), dim=-1).nan_to_num()
        chosen = list(range(self.call.query.shape[1])) if heads is None else list(heads)
        return weights[:, chosen], value[:, chosen]


def make(kind, dtype=torch.float32, length=LENGTH, heads=4, shared=2, **kwargs):
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, heads, length, 8, generator=generator)
    key, value = (torch.randn(2, shared, length, 8, generator=generator) for _ in range(2))
    valid = torch.ones(2, length, dtype=torch.bool)
    if kind == "right padding":
        valid[0, -5:] = False
    elif kind != "causal":
        valid[0, :5] = False
    may = torch.ones(length, length).tril().bool() & valid[:, None, :]
    mask = None
    if kind == "dense bool":
        mask = may[:, None]
    elif kind == "dense additive":
        mask = torch.zeros(2, 1, length, length, dtype=dtype).masked_fill_(~may[:, None], torch.finfo(dtype).min)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    call = AttentionCall(query, key, value, mask, {"scaling": 0.5, **kwargs}, None, "sdpa")
    return Case(call, valid, kind != "causal" and mask is None, may & valid[:, :, None])


@pytest.mark.parametrize("block", [5, 256])
@pytest.mark.parametrize("heads", [None, (0, 2, 3), (1,)])
@pytest.mark.parametrize("kind", MASKS)
def test_received_attention_equals_column_means(kind, heads, block, monkeypatch):
    monkeypatch.setattr(segments, "ROW_BLOCK", block)
    case = make(kind)
    call = case.segments(heads)
    received, seen = call.received(case.valid)
    weights, _ = case.dense(heads)
    rows = case.may.sum(dim=1)
    assert torch.equal(seen, rows)
    torch.testing.assert_close(received.double(), weights.sum(dim=2) / rows[:, None].clamp(min=1), atol=1e-6, rtol=0)
    own = [*range(4)] if heads is None else list(heads)
    keys = case.call.key.repeat_interleave(2, dim=1)[:, own]
    scores = (case.call.query[:, own] @ keys.transpose(2, 3) * 0.5).masked_fill(~case.may[:, None], -torch.inf)
    real = case.valid[:, None].expand(-1, len(own), -1)
    torch.testing.assert_close(call.denominators[real], scores.logsumexp(dim=-1)[real])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [None, (0, 2, 3), (3, 1)])
@pytest.mark.parametrize("kind", MASKS)
def test_closed_form_equals_explicit_weights(kind, heads, softcap, monkeypatch):
    monkeypatch.setattr(segments, "ROW_BLOCK", 7)
    case = make(kind, softcap=softcap)
    call = case.segments(heads)
    method = Damp(listed=heads)
    received, seen = call.received(case.valid)
    chosen = method.choose(received, seen, None)
    assert len({int(n) for n in chosen.sum(dim=-1).flatten()}) > 1
    every, values = case.dense(None)
    output = (every @ values).transpose(1, 2).float()
    edited, moved = call.reweight(output.clone(), chosen, method)

    weights, values = case.dense(heads)
    expected = output.double().clone()
    after = method.reweight(weights, chosen)
    expected[:, :, list(range(4) if heads is None else heads)] = (after @ values).transpose(1, 2)
    torch.testing.assert_close(edited[case.valid].double(), expected[case.valid], atol=TOLERANCE, rtol=0)
    distance = (after - weights).abs().sum(dim=-1).mul(0.5).sum(dim=1) / 4
    torch.testing.assert_close(moved[case.valid].double(), distance[case.valid], atol=1e-6, rtol=0)
    assert torch.isfinite(edited).all()
    assert (expected - output)[case.valid].abs().max() > 0.1


def test_rows_that_hold_nearly_everything_on_the_set_are_computed_explicitly(monkeypatch):
    """The first key draws all but 1e-4 of the mass; taken out of the output, nothing but rounding would be left."""
    case = make("causal")
    case.call.query[..., 0], case.call.key[..., 0] = 5.0, 0.0
    case.call.query[..., 1:] *= 0.1
    case.call.key[:, :, 0] = torch.tensor([5.0] + [0.0] * 7)
    chosen = torch.zeros(2, 4, LENGTH, dtype=torch.bool)
    chosen[..., 0] = True
    weights, values = case.dense(None)
    output = (weights @ values).transpose(1, 2).float()
    expected = (Damp().reweight(weights, chosen) @ values).transpose(1, 2)

    def error():
        call = case.segments(None)
        call.received(case.valid)
        return float((call.reweight(output.clone(), chosen, Damp())[0].double() - expected).abs().max())

    assert 1 - weights[:, :, 1:, 0].max() < 1e-4
    assert error() < TOLERANCE
    monkeypatch.setattr(segments, "LEAST_REST", 0.0)
    assert error() > 2 * TOLERANCE


def test_half_precision_stays_within_its_own_rounding():
    case = make("left padding", dtype=torch.bfloat16)
    call = case.segments(None)
    method = Damp()
    received, seen = call.received(case.valid)
    chosen = method.choose(received, seen, None)
    weights, values = case.dense(None)
    output = (weights @ values).transpose(1, 2).bfloat16()
    edited, _ = call.reweight(output, chosen, method)
    assert edited.dtype == torch.bfloat16
    expected = (method.reweight(weights, chosen) @ values).transpose(1, 2)
    # Logits of about 6 rounded to eight bits: 3% of a weight.
    torch.testing.assert_close(edited[case.valid].double(), expected[case.valid], atol=6e-2, rtol=0)


def test_nothing_chosen_returns_the_very_output():
    case = make("causal")
    call = case.segments(None)
    call.received(case.valid)
    output = torch.randn(2, LENGTH, 4, 8)
    edited, moved = call.reweight(output, torch.zeros(2, 4, LENGTH, dtype=torch.bool), Damp())
    assert edited is output
    assert not moved.any()


@pytest.mark.parametrize("kind", MASKS)
def test_visible_keys_are_columns_of_what_is_visible(kind):
    case = make(kind)
    keys = torch.randint(0, LENGTH, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    valid = case.valid if case.padded else None
    picked = visible_keys(case.call.dense_mask, keys, LENGTH, LENGTH, valid)
    rows = torch.arange(LENGTH).expand(2, -1)
    allowed = visible(case.call.dense_mask, rows, LENGTH, LENGTH, valid, causal=True)
    allowed = allowed if allowed.dtype == torch.bool else allowed == 0
    expected = allowed.expand(2, 4, -1, -1).gather(3, keys[:, :, None].expand(-1, -1, LENGTH, -1))
    assert torch.equal(picked, expected)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that operations make; views of a known tensor do not count."""

    def __init__(self, known=None):
        super().__init__()
        self.known = known.data_ptr() if known is not None else None
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() != self.known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["causal", "left padding"])
def test_memory_grows_with_the_sequence_not_with_its_square(kind, monkeypatch):
    monkeypatch.setattr(segments, "ROW_BLOCK", 16)

    def largest(length):
        case = make(kind, length=length)
        call = case.segments(None)
        with LargestTensor() as seen:
            received, rows = call.received(case.valid)
            chosen = Damp().choose(received, rows, None)
            call.reweight(torch.zeros(2, length, 4, 8), chosen, Damp())
        return seen.bytes

    assert largest(800) < 2.1 * largest(400)
    assert largest(1600) < 1600 * 1600, "not even one byte per pair of rows and keys"


def test_a_dense_mask_is_not_copied():
    case = make("dense bool", length=900)
    call = case.segments(None)
    chosen = torch.zeros(2, 4, 900, dtype=torch.bool)
    chosen[..., [7, 40]] = True
    call.received(case.valid)
    with LargestTensor(case.call.mask) as seen:
        call.reweight(torch.zeros(2, 900, 4, 8), chosen, Damp())
    assert 0 < seen.bytes < 900 * 900


# -- in models ---------------------------------------------------------------------------------------------------------


def explicitly(self, method):
    return self._recompute([method], [], self.stage.rows(["all"], self.call.query.shape[2]))


def logits(zoo, inputs, method, *also):
    with lmmhooks.wrap(zoo.model, method, *also):
        out = zoo.model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_equals_explicit_weights_in_every_family(family, attn, monkeypatch):
    zoo = build(family, attn=attn)
    inputs = zoo.inputs(batch=3, images=[1, 0, 2])
    fused = logits(zoo, inputs, Damp(listed=(0, 3)))
    monkeypatch.setattr(Edit, "_segment", explicitly)
    dense = logits(zoo, inputs, Damp(listed=(0, 3)))
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
    assert (dense[:, 0] - plain).abs().amax(dim=-1).min() > 1e-2
    torch.testing.assert_close(fused, dense, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("also", ["random(keep=4)", "fastv(keep=4, layer=2)", "vcd(beta=0.0)"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_closed_form_equals_explicit_weights_under_other_methods(family, also, monkeypatch):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    fused = logits(zoo, inputs, Damp(), also)
    monkeypatch.setattr(Edit, "_segment", explicitly)
    torch.testing.assert_close(fused, logits(zoo, inputs, Damp(), also), atol=TOLERANCE, rtol=0)


def test_a_cache_of_fixed_length_gives_the_same_answer():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with lmmhooks.wrap(zoo.model, Damp()):
        growing = zoo.model.generate(**inputs, **settings)
        fixed = zoo.model.generate(**inputs, **settings, cache_implementation="static")
    for a, b in zip(growing.logits, fixed.logits, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_statistics_tell_how_much_mass_moved(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)

    def moved():
        with torch.no_grad(), lmmhooks.wrap(zoo.model, Damp()) as patch:
            zoo.model(**inputs)
            return [layer.moved for layer in patch.stats.layers]

    fused = moved()
    monkeypatch.setattr(Edit, "_segment", explicitly)
    assert fused == pytest.approx(moved(), abs=1e-5)
    assert min(fused) > 0.01
