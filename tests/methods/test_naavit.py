"""NAAViT against attention query by query, and the blocks that stand for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import lmmhooks
from lmmhooks import cost
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.engines.skipping import prompt_tokens
from lmmhooks.methods.reduction import sparse
from lmmhooks.methods.reduction.compute import PromptTokens
from lmmhooks.methods.reduction.naavit import NAAViT, visual_pairs
from lmmhooks.methods.reduction.sparse import attend_blocks, row_blocks, seen_keys
from tests.methods.rendered import SEVERAL, equals_rendering, prompts_of, same_bits
from tests.reference.compute import near, split_rows
from tests.zoo import build

LAYERS = (0, 1, 3)


def inside(prompts, vv, cross, window=5, causal=False):
    """Pairs of visual tokens, one at a time."""
    beside = near(prompts, window, causal)

    def see(sample, query, key):
        if cross == "causal" and prompts.cells[sample, key][0] < prompts.cells[sample, query][0]:
            return True
        return {"none": False, "self": query == key, "neighbor": beside(sample, query, key)}[vv]

    return see


@pytest.mark.parametrize("vv", ["none", "self", "neighbor"])
@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering(family, vv):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    prompts = prompts_of(zoo, inputs)
    method = NAAViT(layers=LAYERS, vv=vv, window=3)
    see = split_rows(prompts, LAYERS, inside(prompts, vv, "none", window=3))
    equals_rendering(zoo, inputs, method, prompts, see=see)


@pytest.mark.parametrize("vv", ["none", "neighbor"])
def test_later_images_may_see_earlier_ones(vv):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1], adjacent=True)
    prompts = prompts_of(zoo, inputs)
    method = NAAViT(vv=vv, cross_image="causal", causal=True, window=3)
    see = split_rows(prompts, range(4), inside(prompts, vv, "causal", window=3, causal=True))
    equals_rendering(zoo, inputs, method, prompts, see=see)


def test_frozen_rows_are_those_of_shortv():
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=2)
    equals_rendering(zoo, inputs, NAAViT(layers=(1, 2), vv="frozen"), prompts_of(zoo, inputs), frozen=(1, 2))


def test_text_rows_of_the_first_layer_are_the_plain_ones():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    outputs = []
    for methods in ((), ("naavit",)):
        hook = zoo.model.model.language_model.layers[0].register_forward_hook(lambda m, args, out: outputs.append(out))
        with torch.no_grad(), lmmhooks.wrap(zoo.model, *(methods or ("attention-identity",))):
            zoo.model(**inputs)
        hook.remove()
    text = (inputs["input_ids"] != zoo.model.config.image_token_id) & inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs[0][text], outputs[1][text], atol=1e-5, rtol=0)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def tokens_of(*runs: str) -> PromptTokens:
    """``"t3"`` is three text tokens, ``"v2x4"`` an image of two rows of four cells."""
    image, place = [], []
    for run in runs:
        if run[0] == "t":
            image += [-1] * int(run[1:])
            place += [(-1, -1, -1)] * int(run[1:])
        else:
            rows, cols = map(int, run[1:].split("x"))
            image += [max(image, default=-1) + 1] * (rows * cols)
            place += [(0, r, c) for r in range(rows) for c in range(cols)]
    crop, row, col = torch.tensor(place).T
    return PromptTokens(torch.tensor(image), crop, row, col, True)


def all_seen(tokens: PromptTokens, pairs) -> torch.Tensor:
    """``[n, n]`` bool: what every row sees."""
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    seen[tokens.visual] = seen_keys(tokens, tokens.visual.nonzero().flatten(), pairs)
    return seen


@pytest.mark.parametrize("size", [1, 3, 128])
@pytest.mark.parametrize("vv", ["none", "self", "neighbor"])
def test_blocks_equal_one_masked_matrix(vv, size):
    tokens = tokens_of("t3", "v4x5", "t2", "v3x3", "t4")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, len(tokens), 8, generator=generator) for heads in (6, 2, 2))
    pairs = partial(visual_pairs, vv=vv, cross_image=False, window=3, causal=False)
    blocks = row_blocks(tokens, pairs, size)
    assert torch.cat([block.rows for block in blocks.blocks]).sort().values.tolist() == list(range(len(tokens)))
    seen = all_seen(tokens, pairs)
    scores = (q @ k.repeat_interleave(3, dim=0).transpose(1, 2) * 0.3).masked_fill(~seen, float("-inf"))
    expected = torch.softmax(scores, dim=-1) @ v.repeat_interleave(3, dim=0)
    torch.testing.assert_close(attend_blocks(q, k, v, 0.3, blocks.blocks), expected, atol=1e-6, rtol=0)
    visual = tokens.visual
    assert blocks.visual_pairs == int(seen[visual][:, visual].sum())
    assert blocks.text_pairs == int(seen[visual][:, ~visual].sum())


def test_no_row_is_without_keys():
    tokens = tokens_of("v2x2", "t1", "v1x3")
    for vv in ("none", "self", "neighbor"):
        pairs = partial(visual_pairs, vv=vv, cross_image=False, window=1, causal=True)
        assert all_seen(tokens, pairs).any(dim=1).all()
    none = all_seen(tokens, sparse.no_pairs)
    assert none[0].nonzero().tolist() == [[0]], "nothing comes before it: it sees itself"
    assert none[5].nonzero().tolist() == [[4]], "text before it, and nothing else"
    assert none[4].tolist() == [True] * 5 + [False] * 3, "text sees all images"


def test_pairs_nobody_looks_at_are_left_out():
    tokens = tokens_of("t5", "v16x16", "t6")
    blocks = row_blocks(tokens, sparse.no_pairs)
    visual = [block for block in blocks.blocks if block.visual]
    assert all(block.keys.tolist() == list(range(5)) and block.seen is None for block in visual)
    near_blocks = row_blocks(tokens, partial(sparse.neighbours, window=3, causal=False), 32)
    # Two grid rows and one on each side, behind the five tokens of the prefix.
    assert all(len(block.keys) <= 5 + 4 * 16 for block in near_blocks.blocks if block.visual)


@pytest.mark.parametrize("vv", ["none", "self", "neighbor"])
def test_statistics_count_the_pairs(vv):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, NAAViT(layers=(1,), vv=vv, window=3)) as patch:
        zoo.model(**inputs)
        stats = patch.stats
        rows = prompt_tokens(find_runtime(zoo.model).last.layout)
    shape = cost.DecoderShape.from_config(zoo.model.config.text_config)
    expected = 0.0
    for _, tokens in rows:
        text, dense = len(tokens) - 16, cost.LayerCounts.dense(len(tokens))
        if vv == "neighbor":
            # 4 corners see 4 cells, 8 at an edge 6, 4 inside 9; all see the prefix.
            pairs = text * len(tokens) + 16 * 3 + 4 * 4 + 8 * 6 + 4 * 9
            layer = cost.LayerCounts(*[len(tokens)] * 4, pairs, len(tokens))
        else:
            layer = cost.LayerCounts.without_visual_pairs(text, 16, 3, see_self=vv == "self")
        expected += 2 * cost.prefill_macs(shape, [dense, layer, dense, dense])
    assert stats.prefill_flops == pytest.approx(expected)


def test_no_layer_is_no_change():
    same_bits(build("llava"), NAAViT(layers=()))


def test_unknown_geometry_is_refused(monkeypatch):
    zoo = build("llava")
    unknown = PromptTokens(*[torch.zeros(4, dtype=torch.long)] * 4, placed=False)
    monkeypatch.setattr("lmmhooks.engines.skipping.prompt_tokens", lambda layout: [(torch.arange(4), unknown)])
    with (
        pytest.raises(lmmhooks.PromptError, match="where visual tokens lie in the image is not known"),
        torch.no_grad(),
        lmmhooks.wrap(zoo.model, NAAViT(vv="neighbor")),
    ):
        zoo.model(**zoo.inputs(batch=1))


@pytest.mark.parametrize(
    "settings", [{"vv": "all"}, {"cross_image": "all"}, {"window": 4}, {"window": 0}, {"layers": (4,)}]
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.wrap(build("llava").model, lmmhooks.method("naavit", **settings))
