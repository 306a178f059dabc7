"""YOPO against attention query by query: neighbourhoods, head masks and the layer cut, alone and together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lmmhooks
from lmmhooks import cost
from lmmhooks.engines.skipping import prompt_tokens
from lmmhooks.methods.reduction.sparse import neighbours
from lmmhooks.methods.reduction.yopo import YOPO, hide_image, looks_at_image
from tests.methods.dense import answer
from tests.methods.rendered import SEVERAL, equals_rendering, prompts_of, same_bits
from tests.methods.test_naavit import tokens_of
from tests.reference.compute import near, split_rows
from tests.zoo import build


def rendering(prompts, method, depth=4):
    """Arguments of `rendered`."""
    cut = depth if method.layer_cut is None else method.layer_cut
    heads = {} if method.heads == "all" else {layer: set(kept) for layer, kept in method.heads}

    def weigh(layer, sample, head, query, keys, weights):
        behind = layer >= cut
        lost = behind or (layer in heads and head not in heads[layer])
        if not lost:
            return weights
        if prompts.kind(sample, query) == "visual":
            # Its output is multiplied by the head mask; behind the cut it is overwritten.
            return weights * 0
        for place, key in enumerate(keys):
            if prompts.kind(sample, key) == "visual":
                weights[place] = 0
        renormalise = method.renormalise_cut if behind else method.renormalise_heads
        return weights / weights.sum() if renormalise else weights

    see = None
    if method.window is not None:
        see = split_rows(prompts, range(cut), near(prompts, method.window, method.causal))
    return {"see": see, "weigh": weigh, "frozen": range(cut, depth)}


CASES = {
    "window": YOPO(window=3),
    "causal window": YOPO(window=3, causal=True),
    "heads": YOPO(window=None, heads={1: [0, 3], 2: []}),
    "heads renormalised": YOPO(window=None, heads={0: [1], 1: [0, 3]}, renormalise_heads=True),
    "cut": YOPO(window=None, layer_cut=2),
    "cut renormalised": YOPO(window=None, layer_cut=2, renormalise_cut=True),
    "everything": YOPO(window=3, heads={1: [0, 3], 3: [1]}, layer_cut=3),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_rendering(case):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    prompts = prompts_of(zoo, inputs)
    equals_rendering(zoo, inputs, CASES[case], prompts, **rendering(prompts, CASES[case]))


@pytest.mark.parametrize("family", SEVERAL)
def test_all_of_it_on_other_families(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    prompts = prompts_of(zoo, inputs)
    equals_rendering(zoo, inputs, CASES["everything"], prompts, **rendering(prompts, CASES["everything"]))


def test_neighbourhoods_hold_their_number_of_cells():
    tokens = tokens_of("t2", "v6x7", "t1")
    for window, reach in ((1, 0), (3, 1), (5, 2)):
        rows = tokens.visual.nonzero().flatten()
        counts = neighbours(tokens, rows, window, causal=False)[:, tokens.visual].sum(dim=1).view(6, 7)
        assert counts[0, 0] == counts[5, 6] == (reach + 1) ** 2
        assert counts[3, 3] == (window**2)
        before = neighbours(tokens, rows, window, causal=True)[:, tokens.visual].sum(dim=1).view(6, 7)
        assert before[3, 3] == (window**2 + 1) // 2


@pytest.mark.parametrize(
    "method",
    [
        YOPO(window=None),
        YOPO(window=7, causal=True),  # the grid is 4 x 4: 2 * 4 - 1 holds all of it
        YOPO(window=None, heads={1: [0, 1, 2, 3]}),
        YOPO(window=None, layer_cut=4),
    ],
    ids=["nothing", "the whole grid", "all heads", "a cut past the last layer"],
)
def test_settings_that_leave_nothing_out_change_no_bit(method):
    same_bits(build("llava"), method)


def test_rows_sum_to_one_only_when_renormalised():
    weights = torch.rand(2, 4, 3, 9, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    visual = torch.zeros(2, 9, dtype=torch.bool)
    visual[0, 2:5] = visual[1, 4:8] = True
    lost = torch.tensor([True, False, True, False])
    plain, again = (hide_image(weights, visual, lost, renormalise) for renormalise in (False, True))
    assert torch.equal(plain[:, ~lost], weights[:, ~lost])
    assert plain[:, lost].sum(dim=-1).max() < 1
    torch.testing.assert_close(again.sum(dim=-1), torch.ones(2, 4, 3))
    scores = weights.log().masked_fill(visual[:, None, None] & lost[:, None, None], float("-inf"))
    torch.testing.assert_close(again, scores.softmax(dim=-1))


def test_heads_are_told_apart_by_what_they_look_at():
    weights = torch.tensor([[[0.1, 0.5, 0.2, 0.2], [0.7, 0.1, 0.1, 0.1]]])
    ratio = looks_at_image(weights, torch.tensor([[False, True, True, False]]))
    torch.testing.assert_close(ratio, torch.tensor([[0.7 / 0.3, 0.2 / 0.8]]))


def test_statistics_count_what_was_left_out():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    method = YOPO(window=3, heads={1: [0]}, layer_cut=3)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
        zoo.model(**inputs)
        stats = patch.stats
    text, near_cells = inputs["input_ids"].shape[1] - 16, 4 * 4 + 8 * 6 + 4 * 9
    layer = cost.LayerCounts.neighbourhood(text, 16, near_cells)
    # In layer 1 visual rows attend in one head of four.
    fewer = text * (text + 16) + (16 * text + near_cells) / 4
    expected = [
        layer,
        cost.LayerCounts(*[text + 16] * 4, fewer, text + 16),
        layer,
        cost.LayerCounts.frozen_visual(text, 16),
    ]
    shape = cost.DecoderShape.from_config(zoo.model.config.text_config)
    assert stats.prefill_flops == pytest.approx(2 * cost.prefill_macs(shape, expected))


def test_generated_rows_lose_the_image_too():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    tokens, logits = answer(zoo, inputs, YOPO(window=None, heads={2: []}))
    with torch.no_grad(), lmmhooks.wrap(zoo.model, YOPO(window=None, heads={2: []})):
        whole = zoo.model(**inputs)
        cache = whole.past_key_values
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "attention-identity"):
        plain = zoo.model(**inputs)
        step = zoo.model(input_ids=tokens[:, :1], past_key_values=plain.past_key_values).logits
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert (logits[:, 1] - step[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"window": 4}, "window"),
        ({"window": -1}, "window"),
        ({"layer_cut": -1}, "layer_cut"),
        ({"layer_cut": 5}, "layer_cut"),
        ({"heads": "some"}, "heads"),
        ({"heads": {4: [0]}}, "heads"),
        ({"heads": {1: [4]}}, "heads"),
        ({"heads": [3]}, "heads"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=f"yopo: {name}"):
        lmmhooks.wrap(build("llava").model, lmmhooks.method("yopo", **settings))


def test_a_head_list_that_was_not_measured_is_asked_for():
    with pytest.raises(lmmhooks.MethodError, match=r"heads has to be measured.*lmmhooks calibrate yopo"):
        lmmhooks.wrap(build("llava").model, "yopo(heads=None)")


def test_presets_are_the_released_settings():
    qwen = lmmhooks.method("yopo", preset="qwen2-vl", heads=None)
    assert (qwen.window, qwen.layer_cut, qwen.renormalise_cut, qwen.renormalise_heads) == (None, 24, True, False)
    llava = lmmhooks.method("yopo", preset="llava-13b")
    assert (llava.window, llava.layer_cut) == (5, 20)


def test_only_neighbourhoods_need_geometry(monkeypatch):
    def unplaced(layout):
        return [(at, replace(tokens, placed=False)) for at, tokens in prompt_tokens(layout)]

    monkeypatch.setattr("lmmhooks.engines.skipping.prompt_tokens", unplaced)
    zoo = build("llava")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "yopo(window=None, heads={1: [0]})"):
        assert torch.isfinite(zoo.model(**zoo.inputs(batch=1)).logits).all()
    with (
        pytest.raises(lmmhooks.PromptError, match="use window=None"),
        torch.no_grad(),
        lmmhooks.wrap(zoo.model, "yopo"),
    ):
        zoo.model(**zoo.inputs(batch=1))
