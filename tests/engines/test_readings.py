"""What reducers may read besides attention of earlier layers: states, keys, and a layer that has not run yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import Cut, ReductionMethod, TokenGroup
from lmmhooks.methods.reduction.selection import top_ascending
from tests.reference.reduction import tower_attention
from tests.zoo import FAMILIES, build

# float32, one layer in another order of summation.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reading(ReductionMethod):
    """Keeps the first tokens of every image and notes what it was given."""

    id: ClassVar[str] = "test-reading"

    keep: int | float | None = 0.5
    wanted: tuple[Probe, ...] = ()
    layers: tuple[int, ...] = (0,)
    seen: list[TokenGroup] = field(default_factory=list, compare=False)
    newline: str = "keep_per_row"

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(layer, 0.5 ** (i + 1)) for i, layer in enumerate(self.layers)]

    def probes(self, family: Any) -> list[Probe]:
        return list(self.wanted)

    def select(self, tokens: TokenGroup) -> torch.Tensor:
        self.seen.append(tokens)
        size = tokens.position.shape
        return torch.arange(tokens.num_keep).expand(size[0], -1)


def read(zoo, inputs, *probes: Probe, layers: tuple[int, ...] = (0,)) -> list[TokenGroup]:
    method = Reading(wanted=probes, layers=layers)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs)
    return method.seen


def layer_inputs(zoo, inputs) -> list[torch.Tensor]:
    """What enters every decoder layer; `output_hidden_states` lacks what the model adds between layers."""
    found = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in resolve(zoo.model).layers
    ]
    with torch.no_grad():
        zoo.model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_outputs_of_vision_layers_are_the_features_that_the_projector_takes():
    for name in ("llava", "llava_next"):
        zoo = build(name)
        family = resolve(zoo.model)
        inputs = zoo.inputs(batch=1)
        for tokens in read(zoo, inputs, Probe("vision_states", family.feature_layer)):
            features = tokens.probes[f"vision_states[{family.feature_layer}]"]
            torch.testing.assert_close(family.project(features), tokens.states, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("signal", ["vision_states", "vision_keys", "vision_cls_state"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_channel_of_a_vector_finds_its_token_as_a_score_does(name, signal, monkeypatch):
    zoo = build(name)
    family = resolve(zoo.model)
    if signal == "vision_cls_state" and not family.has_cls:
        return  # such towers have nothing to read
    layer = family.feature_layer
    noted = []
    convert = type(family).tower_to_tokens

    def noting(self, per_patch, vision):
        noted.append((self, list(per_patch), vision))
        return convert(self, per_patch, vision)

    monkeypatch.setattr(type(family), "tower_to_tokens", noting)
    seen = read(zoo, zoo.inputs(batch=2, images=[2, 1]), Probe(signal, layer))
    ((own, pieces, vision),) = noted
    assert pieces[0].shape[-1] == 32
    vectors = torch.cat(convert(own, pieces, vision))
    for channel in (0, 7, 31):
        scores = torch.cat(convert(own, [piece[..., channel : channel + 1] for piece in pieces], vision))
        assert torch.equal(scores[:, 0].nan_to_num(), vectors[:, channel].nan_to_num())
    for tokens in seen:
        values = tokens.probes[f"{signal}[{layer}]"]
        assert values.shape[:2] == tokens.position.shape
        assert torch.isfinite(values).all()
        if signal == "vision_cls_state" and tokens.grid is not None:
            assert torch.equal(values, values[:, :1].expand_as(values))


def test_the_class_row_counts_as_a_query_of_global_attention_and_as_one_head_of_the_wide_one():
    zoo = build("llava")
    family = resolve(zoo.model)
    inputs = zoo.inputs(batch=1)
    seen: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad(), tower_attention(zoo.model, seen):
        zoo.model(**inputs)
    (weights,) = seen[1]
    (tokens,) = read(zoo, inputs, Probe("vision_global", 1), Probe("vision_received", 1), Probe("vision_cls_wide", 1))
    expected = weights[0].mean(dim=0).mean(dim=0)[1:]
    torch.testing.assert_close(tokens.probes["vision_global[1]"][0], expected, atol=1e-6, rtol=0)
    expected = weights[0].mean(dim=0)[1:].mean(dim=0)[1:]
    torch.testing.assert_close(tokens.probes["vision_received[1]"][0], expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        states = family.vision(inputs["pixel_values"], output_hidden_states=True).hidden_states[1]
        layer = family.vision_layers[1]
        normed = layer.layer_norm1(states)[0]
        query, key = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
        wide = torch.softmax(query[0] @ key.T / query.shape[-1] ** 0.5, dim=-1)[1:]
    torch.testing.assert_close(tokens.probes["vision_cls_wide[1]"][0], wide, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl"])
def test_inputs_of_earlier_layers_are_seen_where_the_cut_stands(name):
    zoo = build(name)
    inputs = zoo.inputs(batch=2)
    states = layer_inputs(zoo, inputs)
    for tokens in read(zoo, inputs, Probe("decoder_states", 0), Probe("decoder_states", 1), layers=(2,)):
        for layer in (0, 1):
            expected = states[layer][tokens.sample[:, None], tokens.position]
            torch.testing.assert_close(tokens.probes[f"decoder_states[{layer}]"], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", ["last", "after_image"])
def test_attention_of_the_layer_to_come_is_what_that_layer_would_pay(name, rows):
    zoo, eager = build(name), build(name, attn="eager")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        weights = eager.model(**inputs, output_attentions=True).attentions[2].mean(dim=1)
    for tokens in read(zoo, inputs, Probe("decoder_rows", 2, rows, ahead=True), layers=(2,)):
        members = tokens.layout.last if rows == "last" else tokens.layout.after_image
        mean = torch.stack([weights[b, members[b]].mean(dim=0) for b in range(2)])
        expected = mean[tokens.sample[:, None], tokens.position]
        (values,) = tokens.probes.values()
        torch.testing.assert_close(values, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_attention_of_the_layer_to_come_after_an_earlier_cut(name):
    """The second cut's attention is paid in the shorter sequence, by survivors with the positions they have there."""
    zoo = build(name)
    inputs = zoo.inputs(batch=2)
    probes = [Probe("decoder_rows", 1, ahead=True), Probe("decoder_rows", 2, ahead=True)]
    peeked = read(zoo, inputs, *probes, layers=(1, 2))[-1].probes["decoder_rows[2, last, ahead]"]
    found: list[torch.Tensor] = []

    @dataclass(frozen=True)
    class Looking(Reading):
        id: ClassVar[str] = "test-looking"

        def select(self, tokens: TokenGroup) -> torch.Tensor:
            if tokens.layer == 3:
                found.append(tokens.probes["decoder_rows[2, last]"])
            return super().select(tokens)

    # The same two cuts, but layer 2 is left alone and read after it ran, by the third cut.
    with (
        torch.no_grad(),
        lmmhooks.wrap(zoo.model, Looking(wanted=(probes[0], Probe("decoder_rows", 2)), layers=(1, 3))),
    ):
        zoo.model(**inputs)
    torch.testing.assert_close(peeked, found[-1], atol=TOLERANCE, rtol=0)


def test_a_layer_behind_a_cut_of_the_method_is_read_as_it_ran():
    """Cuts at neighbouring layers: what the second reads is attention in the sequence the first left."""
    zoo = build("llava")
    probe = Probe("decoder_rows", 2)
    found = read(zoo, zoo.inputs(batch=1), probe, layers=(2, 3))
    assert probe.name not in found[0].probes, "layer 2 has not run when the cut before it happens"
    assert found[1].probes[probe.name].shape == (1, 8)
    assert found[1].readings[probe.name].shape == found[1].hidden.shape[:2]


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_cut_may_count_what_is_there_and_group_in_its_own_way(name):
    zoo = build(name)
    inputs = zoo.inputs(batch=1, images=2)

    @dataclass(frozen=True)
    class Twice(Reading):
        id: ClassVar[str] = "test-twice"

        def cuts(self, family: Any) -> list[Cut]:
            return [Cut(1, 0.5), Cut(2, 0.5, of_current=True, scope="sample")]

    method = Twice(newline="rank")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
        zoo.model(**inputs)
        counts = [layer.visual_kept[0] for layer in patch.stats.layers]
    groups = [tokens.position.shape for tokens in method.seen]
    sizes = [n for (g, n) in groups[:-1] for _ in range(g)]
    assert counts == [sum(sizes), sum(n // 2 for n in sizes), sum(n // 2 for n in sizes) // 2, counts[2]]
    assert groups[-1] == (1, counts[1])


def test_a_reduction_of_rows_sees_every_block_once_and_other_readings(monkeypatch):
    from lmmhooks.engines import editing

    monkeypatch.setattr(editing, "ROW_BLOCK", 5)
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=2)
    states = Probe("decoder_states", 0)

    def strongest(seen):
        assert torch.equal(seen.read(states), seen.memory.setdefault("states", seen.read(states)))
        weights = seen.weights * seen.members[:, None, :, None]
        return torch.stack([weights.amax(dim=1).sum(dim=1), seen.key.abs().sum(dim=(1, 3)) * 0 + 1], dim=1)

    probe = Probe("decoder_rows", 1, "all", reduce=strongest, label="strongest")
    with torch.no_grad():
        weights = eager.model(**inputs, output_attentions=True).attentions[1]
    for tokens in read(zoo, inputs, states, probe, layers=(2,)):
        values = tokens.probes["decoder_rows[1, all, strongest]"]
        valid = tokens.layout.valid
        expected = torch.stack([weights[b][:, valid[b]].amax(dim=0).sum(dim=0) for b in range(2)])
        expected = expected[tokens.sample[:, None], tokens.position]
        torch.testing.assert_close(values[..., 0], expected, atol=TOLERANCE, rtol=0)
        blocks = -(-int(valid.sum(dim=1).max()) // 5)
        assert torch.equal(values[..., 1], torch.full_like(values[..., 1], blocks))


def test_what_stays_untouched_by_a_cut_that_leaves_the_number_open():
    @dataclass(frozen=True)
    class Everything(ReductionMethod):
        id: ClassVar[str] = "test-everything"

        def cuts(self, family: Any) -> list[Cut]:
            return [Cut(0, None), Cut(2, None)]

        def select(self, tokens: TokenGroup) -> torch.Tensor:
            return top_ascending(tokens.states.norm(dim=-1), tokens.position.shape[1])

    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Everything()) as patch:
            assert torch.equal(zoo.model(**inputs).logits, plain)
            assert patch.stats.kv_bytes == patch.stats.kv_bytes_full
