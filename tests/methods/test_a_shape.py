"""A-shape against attention query by query."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks import cost
from lmmhooks.methods.reduction.a_shape import AShape, window_blocks
from tests.methods.rendered import SEVERAL, equals_rendering, prompts_of, same_bits
from tests.zoo import build


def seen(length, sink, window, last):
    """``[n, n]`` what every row sees, one pair at a time."""
    rows = range(length)
    return torch.tensor([[j <= i and (j < sink or i - j < window or i >= length - last) for j in rows] for i in rows])


@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    prompts = prompts_of(zoo, inputs)

    def see(layer, sample, head, query):
        columns = prompts.columns(sample)
        if query not in columns:
            return None
        allowed = seen(len(columns), 2, 4, 3)[columns.index(query)]
        return [column for column, sees in zip(columns, allowed.tolist(), strict=True) if sees]

    equals_rendering(zoo, inputs, AShape(sink=2, window=4, last_rows=3), prompts, see=see)


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize(("sink", "window", "last"), [(2, 4, 3), (0, 1, 0), (3, 7, 8), (20, 1, 1), (1, 40, 0)])
def test_blocks_hold_every_pair_once(sink, window, last, size):
    found = torch.zeros(30, 30, dtype=torch.long)
    for block in window_blocks(30, sink, window, last, size=size):
        found[block.rows[:, None], block.keys] += block.seen.long()
        assert len(block.keys.unique()) == len(block.keys)
    assert torch.equal(found, seen(30, sink, window, last).long())


def test_statistics_count_the_pairs():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    length = inputs["input_ids"].shape[1]
    shape = cost.DecoderShape.from_config(zoo.model.config.text_config)
    for sink, window, last in ((2, 4, 3), (0, 5, 0), (3, 2, length - 1)):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, AShape(sink, window, last)) as patch:
            zoo.model(**inputs)
            share = int(seen(length, sink, window, last).sum()) / (length * (length + 1) / 2)
            layer = cost.LayerCounts.block_sparse(length, share)
            assert patch.stats.prefill_flops == pytest.approx(2 * cost.prefill_macs(shape, [layer] * 4))


def test_prompts_inside_the_window_change_no_bit():
    same_bits(build("llava"), AShape())
    same_bits(build("llava"), AShape(sink=0, window=1, last_rows=500))


@pytest.mark.parametrize("settings", [{"sink": -1}, {"window": 0}, {"last_rows": -1}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        AShape(**settings)
