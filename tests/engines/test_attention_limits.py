"""Caches, windows and kernels that attention edits must know about, or refuse."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.engines.editing import Edit
from lmmhooks.engines.rows import row_scores
from lmmhooks.methods.attention.base import AttentionMethod
from tests.zoo import build

# The same sums over a few keys more, all of weight zero; largest difference seen is 1e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class FavourImage(AttentionMethod):
    """Every kind of step at once, on rows with an image before them."""

    id: ClassVar[str] = "test-favour-image"

    def scale_keys(self, context):
        return 1.0 + 0.5 * context.layout.visual

    def edit_weights(self, weights, context):
        return weights * (1.0 + 0.1 * context.layout.visual[:, None, None, :])

    def scale_heads(self, queries, outputs, context):
        assert context.keys.shape[2] == context.layout.length
        return torch.linspace(0.5, 1.5, outputs.shape[1])[None, :, None, None]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cache_of_fixed_length_gives_the_same_answer(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with lmmhooks.wrap(zoo.model, FavourImage()):
        growing = zoo.model.generate(**inputs, **settings)
        fixed = zoo.model.generate(**inputs, **settings, cache_implementation="static")
    plain = zoo.model.generate(**inputs, **settings)
    assert not torch.allclose(plain.logits[0], growing.logits[0], atol=1e-3), "an edit that changes nothing"
    assert torch.equal(growing.sequences, fixed.sequences)
    for a, b in zip(growing.logits, fixed.logits, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_layers_that_forget_keys_are_refused():
    zoo = build(
        "qwen2_5_vl",
        layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=8,
    )
    with pytest.raises(lmmhooks.ModelError, match=r"layer 1 .* keeps its keys in a DynamicSlidingWindowLayer"):
        lmmhooks.wrap(zoo.model, FavourImage())
    assert not zoo.model._forward_pre_hooks, "a refused patch leaves no trace"

    @dataclass(frozen=True)
    class Elsewhere(FavourImage):
        id: ClassVar[str] = "test-elsewhere"

        def layers(self, family):
            return [0, 2]

    lmmhooks.wrap(zoo.model, Elsewhere()).remove()


def test_soft_caps_bound_the_logits():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 5, 8, generator=generator)
    plain = row_scores(queries, keys, 2.0)
    capped = row_scores(queries, keys, 2.0, softcap=1.5)
    assert plain.abs().max() > 1.5
    torch.testing.assert_close(capped, 1.5 * torch.tanh(plain / 1.5))


def test_learned_sinks_are_refused():
    call = SimpleNamespace(kwargs={"s_aux": torch.zeros(4)})
    with pytest.raises(lmmhooks.ModelError, match="decoder layer 3 adds learned sinks"):
        Edit(3, None, None, None, call)
