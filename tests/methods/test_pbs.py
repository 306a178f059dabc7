"""PBS against one head and one query at a time, and what its selection promises."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import lmmhooks
from lmmhooks import cost
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.engines.skipping import prompt_tokens
from lmmhooks.methods.reduction.pbs import PBS
from lmmhooks.methods.reduction.permuting import attend_flex, attend_kept, kept_blocks, key_order, pairs_kept
from tests.methods.rendered import SEVERAL, equals_rendering, prompts_of, same_bits
from tests.methods.test_naavit import tokens_of
from tests.reference.compute import pbs
from tests.zoo import build

# float32, one row in another order of summation; largest difference seen is 3e-6 on outputs of about 4.
TOLERANCE = 1e-5
SMALL = {"block": 4, "segment": 8}


def states(length, heads=6, groups=3, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Scores of standard deviation about 3: peaked, as trained attention is.
    return [torch.randn(h, length, width, generator=generator) * 1.8 for h in (heads, heads // groups, heads // groups)]


def expanded(k, groups=3):
    return k.repeat_interleave(groups, dim=0)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("length", [9, 16, 37, 48, 50])
def test_selection_and_output_are_those_of_the_naive_rendering(length, permute, pooling):
    q, k, v = states(length)
    scale = q.shape[-1] ** -0.5
    order = key_order(q, k, scale, **SMALL) if permute else torch.arange(length).expand(6, -1)
    keep = kept_blocks(q, k, order, scale, **SMALL, threshold=0.6, pooling=pooling)
    mean = pooling == "mean"
    expected, orders, kept = pbs(q, expanded(k), expanded(v), **SMALL, threshold=0.6, permute=permute, mean=mean)
    assert order.tolist() == orders
    found = [[set(row.nonzero().flatten().tolist()) for row in head] for head in keep]
    assert found == kept
    if length > 16:
        assert not keep.tril().equal(torch.ones_like(keep).tril()), "a selection that keeps all proves nothing"
    torch.testing.assert_close(attend_kept(q, k, v, order, keep, scale, 4), expected, atol=TOLERANCE, rtol=0)


# Not compiled on a CPU: torch says that this is slow, and uses parts of itself that it calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [16, 37])
def test_flex_attention_has_the_same_mask(length):
    q, k, v = states(length, width=16)
    order = key_order(q, k, 0.25, **SMALL)
    keep = kept_blocks(q, k, order, 0.25, **SMALL, threshold=0.5)
    gathered, flex = (attend(q, k, v, order, keep, 0.25, 4) for attend in (attend_kept, attend_flex))
    torch.testing.assert_close(flex, gathered, atol=TOLERANCE, rtol=0)


def test_everything_kept_is_dense_causal_attention():
    q, k, v = states(45)
    order = key_order(q, k, 0.3, **SMALL)
    keep = kept_blocks(q, k, order, 0.3, **SMALL, threshold=1.0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, expanded(k), expanded(v), is_causal=True, scale=0.3)
    torch.testing.assert_close(attend_kept(q, k, v, order, keep, 0.3, 4), dense, atol=TOLERANCE, rtol=0)
    assert float(pairs_kept(keep, 45, **SMALL)) == pytest.approx(1)


def test_half_precision_attends_to_the_same_blocks():
    q, k, v = states(45)
    order = key_order(q, k, 0.3, **SMALL)
    keep = kept_blocks(q, k, order, 0.3, **SMALL, threshold=0.5)
    half = attend_kept(*(x.bfloat16() for x in (q, k, v)), order, keep, 0.3, 4)
    assert half.dtype == torch.bfloat16
    # Inputs of magnitude 2 with 8 bits.
    torch.testing.assert_close(half.float(), attend_kept(q, k, v, order, keep, 0.3, 4), atol=0.15, rtol=0)


def test_the_order_is_a_permutation_inside_segments():
    q, k, _ = states(45)
    order = key_order(q, k, 0.3, **SMALL)
    for start in range(0, 40, 8):
        inside = order[:, start : start + 8]
        assert torch.equal(inside.sort(dim=1).values, torch.arange(start, start + 8).expand(6, -1))
        assert not torch.equal(inside, inside.sort(dim=1).values)
    assert torch.equal(order[:, 40:], torch.arange(40, 45).expand(6, -1))


def test_ties_keep_the_order_of_the_prompt():
    q, k, _ = states(24)
    assert torch.equal(key_order(q, torch.zeros_like(k), 0.3, **SMALL), torch.arange(24).expand(6, -1))


def test_every_row_sees_itself_and_the_first_token():
    q, k, _ = states(60)
    order = key_order(q, k, 0.3, **SMALL)
    keep = kept_blocks(q, k, order, 0.3, **SMALL, threshold=1e-6)
    place = order.argsort(dim=1) // 4
    rows = torch.arange(60)
    for head in range(6):
        assert keep[head, rows // 4, place[head]].all()
        assert keep[head, rows // 4, place[head, 0].expand(60)].all()
    # One-hot values show who is seen: nothing behind a row.
    seen = attend_kept(q, k, torch.eye(60).expand(2, -1, -1), order, keep, 0.3, 4) > 0
    assert not seen.triu(1).any()
    assert seen[:, rows, rows].all()
    assert seen[:, :, 0].all()


def test_density_grows_with_the_threshold():
    q, k, _ = states(96)
    order = key_order(q, k, 0.3, **SMALL)
    shares, kept = [], []
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        keep = kept_blocks(q, k, order, 0.3, **SMALL, threshold=threshold)
        kept.append(keep)
        shares.append(float(pairs_kept(keep, 96, **SMALL)))
        seen = attend_kept(q, k, torch.eye(96).expand(2, -1, -1), order, keep, 0.3, 4) > 0
        assert float(seen.sum() / 6 / (96 * 97 / 2)) == pytest.approx(shares[-1])
    assert all((less <= more).all() for less, more in pairwise(kept))
    assert shares == sorted(shares)
    assert shares[0] < 0.5


@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering_in_the_model(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = PBS(threshold=0.5, block=2, segment=4, dense_layers=1)

    def whole(layer, q, k, v):
        return pbs(q, k, v, 2, 4, 0.5)[0] if layer >= 1 else None

    equals_rendering(zoo, inputs, method, prompts_of(zoo, inputs), whole=whole)


def test_text_rows_may_be_dense():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    prompts = prompts_of(zoo, inputs)
    method = PBS(threshold=0.4, block=2, segment=4, text_dense=True)
    visual = {sum(prompts.kind(s, c) != "padding" for c in range(inputs["input_ids"].shape[1])): s for s in range(2)}

    def whole(layer, q, k, v):
        sparse = pbs(q, k, v, 2, 4, 0.4)[0]
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        sample = visual[q.shape[1]]
        text = [prompts.kind(sample, c) == "text" for c in prompts.columns(sample)]
        sparse[:, text] = dense[:, text]
        return sparse

    equals_rendering(zoo, inputs, method, prompts, whole=whole)


@pytest.mark.parametrize(
    "method",
    [PBS(threshold=1.0, **SMALL), PBS(segment=256), PBS(min_tokens=1000, **SMALL), PBS(dense_layers=4, **SMALL)],
    ids=["all kept", "a short prompt", "below the minimum", "all layers dense"],
)
def test_settings_that_leave_nothing_out_change_no_bit(method):
    same_bits(build("llava"), method)


def test_segments_may_hold_whole_frames():
    tokens = tokens_of("t3", "v4x5", "v3x3", "t2")
    assert PBS(block=4, segment=8).segment_of(tokens) == 8
    assert PBS(block=4, segment=8, frame_aligned=True).segment_of(tokens) == 20
    assert PBS(block=8, segment=8, frame_aligned=True).segment_of(tokens) == 24
    assert PBS(block=4, segment=32, frame_aligned=True).segment_of(tokens) == 32
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=1, images=0, videos=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, PBS(threshold=0.4, block=2, segment=2, frame_aligned=True)):
        zoo.model(**inputs)
        ((_, tokens),) = prompt_tokens(find_runtime(zoo.model).last.layout)
    assert PBS(block=2, segment=2, frame_aligned=True).segment_of(tokens) == 6, "frames of 2 x 3 tokens"


def test_statistics_count_the_density():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, PBS(threshold=0.3, block=2, segment=4, dense_layers=3)) as patch:
        zoo.model(**inputs)
        stats, state = patch.stats, find_runtime(zoo.model).last
        method = patch.methods[0]
    memory = state.memory(method)
    shape = cost.DecoderShape.from_config(zoo.model.config.text_config)
    expected = 0.0
    for row, (_, tokens) in enumerate(prompt_tokens(state.layout)):
        share = float(memory[3, row])
        assert 0.1 < share < 0.95
        dense = cost.LayerCounts.dense(len(tokens))
        expected += 2 * cost.prefill_macs(shape, [dense] * 3 + [cost.LayerCounts.block_sparse(len(tokens), share)])
    assert stats.prefill_flops == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"block": 0}, "block"),
        ({"block": 100}, "segment"),
        ({"pooling": "sum"}, "pooling"),
        ({"dense_layers": 5}, "dense_layers"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"kernel": "triton"}, "kernel"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=f"pbs: {name}"):
        lmmhooks.wrap(build("llava").model, lmmhooks.method("pbs", **settings))
