"""ToMe behind the tower against Python lists, from the keys of the tower on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.tome_post import ToMePost, merge_rounds
from tests.reference.reduction import keep_only, reduced_logits
from tests.reference.tower import clusters_of
from tests.zoo import FAMILIES, build

# float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5


@contextmanager
def tower_keys(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """Keys ``[crops, H, n, d]`` of a vision layer, one per attention call."""
    family = resolve(model)
    target = family.attention_of(family.vision_layers[layer])
    seen: list[Tensor] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if module is target:
            seen.append(k)
        scaling = kwargs.get("scaling") or q.shape[-1] ** -0.5
        return (torch.softmax(q @ k.transpose(2, 3) * scaling, dim=-1) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_keys", attend)
    AttentionMaskInterface.register("test_keys", eager_mask)
    before = target.config._attn_implementation
    target.config._attn_implementation_internal = "test_keys"
    try:
        yield seen
    finally:
        target.config._attn_implementation_internal = before


def test_the_compared_keys_are_those_of_the_last_layer_that_sees_all():
    layers = {name: ToMePost(keep=4).probes(resolve(build(name).model))[0].layer for name in FAMILIES}
    assert layers == {
        "llava": 1, "llava_next": 1, "llava_onevision": 2, "qwen2_vl": 3, "qwen2_5_vl": 3, "qwen3_vl": 3, "internvl": 2,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("keep", [2, 3])
def test_answers_equal_the_naive_rendering(family, keep):
    """Every crop's tokens are merged in Python; where one token is made of four patches, their keys are averaged."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=2)
    method = ToMePost(keep=keep, keep_per="crop")
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        layout = find_runtime(zoo.model).last.layout
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    first = int(resolve(zoo.model).has_cls)
    with torch.no_grad(), tower_keys(zoo.model, method.probes(resolve(zoo.model))[0].layer) as seen:
        zoo.model(**inputs)
    if family.startswith("qwen"):
        packed = torch.cat([k.mean(dim=1)[0] for k in seen])
        metric = packed.view(-1, 4, packed.shape[-1]).mean(dim=1)
    else:
        (keys,) = seen
        metric = keys.mean(dim=1)[:, first:]
        if family == "internvl":
            metric = metric.view(-1, 2, 2, 2, 2, metric.shape[-1]).mean(dim=(2, 4)).flatten(1, 2)
        metric = metric.flatten(0, 1)
    start = 0
    for row in range(2):
        number = layout.valid[row].long().cumsum(dim=0) - 1
        visual, clusters = set(), {}
        for span in layout.spans_of(row):
            positions = number[span.positions].tolist()
            visual |= set(positions)
            here = metric[start : start + len(positions)]
            start += len(positions)
            for crop in range(len(span.tokens.grids)):
                members = (span.tokens.crop == crop).nonzero().flatten().tolist()
                for cluster in clusters_of([here[i] for i in members], keep):
                    places = [positions[members[i]] for i in cluster]
                    clusters[min(places)] = places
        stay = sorted(clusters)

        def choose(alive, attention, prompt, clusters=clusters, visual=visual, stay=stay):
            states = {token.number: token.state for token in alive}
            for token in alive:
                if token.number in clusters:
                    token.state = torch.stack([states[n] for n in clusters[token.number]]).mean(dim=0)
            return keep_only(visual, stay)(alive, attention, prompt)

        cuts = {0: (choose, not resolve(zoo.model).mrope)}
        expected = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-3:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], expected, atol=TOLERANCE, rtol=0)


def test_rounds_keep_means_and_first_members():
    generator = torch.Generator().manual_seed(0)
    metric, states = torch.randn(3, 29, 6, generator=generator), torch.randn(3, 29, 8, generator=generator)
    for num_keep in (1, 4, 14, 15, 28):
        merged, origin = merge_rounds(metric, states, num_keep)
        for group in range(3):
            clusters = clusters_of(list(metric[group]), num_keep)
            assert origin[group].tolist() == [min(members) for members in clusters]
            means = torch.stack([states[group, members].mean(dim=0) for members in clusters])
            torch.testing.assert_close(merged[group], means)


def test_keeping_everything_is_bit_identical():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        for keep in (1.0, 1000):
            with lmmhooks.wrap(zoo.model, ToMePost(keep=keep)):
                assert torch.equal(zoo.model(**inputs).logits, plain)


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(lmmhooks.MethodError, match="layer=3 is not allowed; layer must be a vision layer, 0 to 2"):
        lmmhooks.wrap(build("llava").model, ToMePost(keep=4, layer=3))
