"""What branches read of a prompt, in the statistics: exactly what was computed, whenever it was."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks import cost
from lmmhooks.methods.decoding.avisc import Avisc
from lmmhooks.methods.decoding.mod import Mod
from tests.engines.test_prefix_sharing import Longer
from tests.zoo import build


def _stats(zoo, inputs, *methods, steps=0):
    with lmmhooks.wrap(zoo.model, *methods) as patch, torch.no_grad():
        if steps:
            zoo.model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
        else:
            zoo.model(**inputs, logits_to_keep=1)
        return patch.stats


def _flops(zoo, counts):
    """Of prompts in which every layer computes so many tokens behind as many that it has already."""
    shape = cost.DecoderShape.from_config(zoo.model.config)

    def macs(tokens):
        return shape.layers * cost.layer_macs(shape, cost.LayerCounts.dense(tokens))

    return sum(2 * (macs(tokens) - macs(known)) for tokens, known in counts)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("method", [Avisc(lam=0.5), Mod()], ids=lambda method: method.id)
def test_branches_that_read_after_the_main_rows_are_counted(method, steps):
    zoo = build("llava")
    stats = _stats(zoo, zoo.inputs(batch=2, text=4), method, steps=steps)
    assert stats.prefill_flops == pytest.approx(2 * stats.prefill_flops_full)
    assert stats.prefill_flops_full > 0
    assert stats.flops_saved == pytest.approx(-1.0)
    assert stats.kv_bytes == 2 * stats.kv_bytes_full


@pytest.mark.parametrize("below", ["fastv(keep=4)", "random(keep=4)"])
def test_branches_beside_a_reduction_are_counted_as_they_were_reduced(below):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    alone = _stats(zoo, inputs, below)
    both = _stats(zoo, inputs, below, Avisc(lam=0.5))
    # The branch reads other features of the same tokens, of which the reduction keeps as many.
    assert both.prefill_flops == pytest.approx(2 * alone.prefill_flops)
    assert both.prefill_flops_full == pytest.approx(alone.prefill_flops_full)
    assert both.kv_bytes == 2 * alone.kv_bytes
    assert [layer.visual_kept for layer in both.layers] == [layer.visual_kept for layer in alone.layers]


def test_lazy_branches_count_once_they_have_read_the_prompt():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    # A cut that leaves one token in every row never needs the branch; one that leaves many needs it at once.
    idle = _stats(zoo, inputs, "vcd(beta=1.0, lazy=True)", steps=2)
    busy = _stats(zoo, inputs, "vcd(beta=0.01, lazy=True)", steps=2)
    assert idle.branch_steps == 0
    assert idle.prefill_flops == pytest.approx(idle.prefill_flops_full)
    assert busy.branch_steps == 1
    assert busy.prefill_flops == pytest.approx(2 * busy.prefill_flops_full)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_branches_have_in_common_with_the_main_rows_is_counted_once(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(1, 1))
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    stats = _stats(zoo, inputs, Longer(beta=0.0))
    # Four columns for all branches: two more tokens before the last two, and as many of the others beside them.
    read = [(length, 0) for length in lengths]
    read += [(length + more, length + more - 4) for more in (2, 0, 0) for length in lengths]
    assert stats.prefill_flops == pytest.approx(_flops(zoo, read))
    assert stats.prefill_flops_full == pytest.approx(_flops(zoo, read[: len(lengths)]))
    assert 0 > stats.flops_saved > -3
