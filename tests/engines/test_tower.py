"""Reduction inside the vision tower: hooks, slots, padding and refusals, with methods that exist only here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import AttentionInterface

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.tower import TowerMethod, TowerStep, are_layers, survivors
from lmmhooks.methods.tensors import TensorSet
from tests.methods.towers import check_answers, check_features, tower_features
from tests.zoo import build

FAMILIES = ["llava", "llava_next", "llava_onevision"]


@dataclass(frozen=True)
class Thin(TowerMethod):
    """Drops patches of small norm: a share of them, or those below the mean, which differs from crop to crop."""

    id: ClassVar[str] = "test-thin"

    share: float | None = 0.7
    layers: tuple[int, ...] = (1, 2, 4)

    def tower_layers(self, family: Any) -> Sequence[int]:
        return [layer for layer in self.layers if layer <= family.feature_layer]

    def reduce(self, tokens) -> TowerStep | None:
        norms = tokens.states.norm(dim=-1)
        real = torch.ones_like(norms, dtype=torch.bool) if tokens.valid is None else tokens.valid.clone()
        real[:, : tokens.first] = False
        if self.share is None:
            mean = (norms * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
            mask = (norms >= mean) & real
        else:
            count = int(self.share * (norms.shape[1] - tokens.first))
            best = norms.masked_fill(~real, -1).topk(count, dim=1).indices
            mask = torch.zeros_like(real).scatter(1, best, True)
        mask[:, : tokens.first] = True
        return tokens.keep(mask)[0]


@dataclass(frozen=True)
class ThinOutputs(Thin):
    id: ClassVar[str] = "test-thin-outputs"
    after = "layer"


@dataclass(frozen=True)
class Weigh(TowerMethod):
    """Keeps everything, but a patch of norm above the mean counts three times as a key from the next layer on."""

    id: ClassVar[str] = "test-weigh"

    def tower_layers(self, family: Any) -> Sequence[int]:
        return [1]

    def reduce(self, tokens) -> TowerStep | None:
        norms = tokens.states.norm(dim=-1)
        weight = torch.where(norms > norms.mean(dim=1, keepdim=True), 3.0, 1.0)
        return TowerStep(tokens.states, tokens.origin, weight=weight)


def thin_rule(method: Thin, has_cls: bool):
    place = method.after

    def make():
        def rule(layer, where, tokens, seen):
            if where != place or layer not in method.layers:
                return tokens
            norms = {token.slot: float(token.state.norm()) for token in tokens[has_cls:]}
            if method.share is None:
                mean = sum(norms.values()) / len(norms)
                stay = {slot for slot, norm in norms.items() if norm >= mean}
            else:
                stay = set(sorted(norms, key=lambda slot: -norms[slot])[: int(method.share * len(norms))])
            return [*tokens[:has_cls], *(token for token in tokens[has_cls:] if token.slot in stay)]

        return rule

    return make


def weigh_rule():
    def rule(layer, where, tokens, seen):
        if (layer, where) == (1, "attention"):
            norms = [float(token.state.norm()) for token in tokens]
            for token, norm in zip(tokens, norms, strict=True):
                token.size = 3 if norm > sum(norms) / len(norms) else 1
        return tokens

    return rule


@pytest.mark.parametrize("method", [Thin(), Thin(share=None), ThinOutputs(), ThinOutputs(share=None)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_a_tower_that_takes_tokens_out(family, method):
    counts = check_features(family, method, thin_rule(method, family != "llava_onevision"))
    assert (len(set(counts)) > 1) == (method.share is None), "crops of different length are what padding is for"


@pytest.mark.parametrize("method", [Thin(), ThinOutputs(share=None)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_tower_that_takes_tokens_out(family, method):
    check_answers(family, method, thin_rule(method, family != "llava_onevision"))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_weights_of_keys_are_added_as_logarithms(attn):
    check_features("llava", Weigh(), weigh_rule, weigh=True)
    zoo, other = build("llava", tower_layers=5, attn=attn), build("llava", tower_layers=5)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with lmmhooks.wrap(zoo.model, Weigh()), lmmhooks.wrap(other.model, Weigh()):
        torch.testing.assert_close(tower_features(zoo, pixels), tower_features(other, pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [Weigh(), Thin(share=None)], ids=str)
def test_backends_that_take_no_mask_are_replaced_where_one_is_needed(method):
    """Flash attention has no place for a number per key; here is a backend that has none either."""

    def attend(module, q, k, v, mask, **kwargs):
        assert mask is None, "a kernel that takes no mask was given one"
        called.append(module)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=kwargs["scaling"])
        return out.transpose(1, 2).contiguous(), None

    called: list[Any] = []
    AttentionInterface.register("test_maskless", attend)
    zoo, other = build("llava", tower_layers=5), build("llava", tower_layers=5)
    zoo.model.model.vision_tower.config._attn_implementation_internal = "test_maskless"
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with lmmhooks.wrap(zoo.model, method), lmmhooks.wrap(other.model, method):
        torch.testing.assert_close(tower_features(zoo, pixels), tower_features(other, pixels), atol=1e-5, rtol=1e-5)
    assert called, "layers before the first reduction need no mask"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [Weigh(), Thin(share=None)], ids=str)
def test_half_precision_pads_and_weighs_alike(method, dtype):
    """Numbers that stand for "nothing" must survive the cast: features stay near those of float32, and finite."""
    zoo, exact = build("llava", tower_layers=4, dtype=dtype), build("llava", tower_layers=4)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with lmmhooks.wrap(zoo.model, method), lmmhooks.wrap(exact.model, method):
        features, expected = tower_features(zoo, pixels.to(dtype)).float(), tower_features(exact, pixels)
    assert torch.isfinite(features).all()
    # A patch near the mean may fall on the other side of it; the class token sees all that is left.
    assert (features[:, 0] - expected[:, 0]).norm() < 0.1 * expected[:, 0].norm()


def test_crops_do_not_see_each_other():
    zoo = build("llava", tower_layers=6)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with lmmhooks.wrap(zoo.model, Thin(share=None)):
        together = tower_features(zoo, pixels)
        alone = torch.cat([tower_features(zoo, crop[None]) for crop in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_hidden_states_of_all_layers_can_be_asked_for():
    """Those between a reduction and the projector are shorter, the one the projector takes is not."""
    zoo = build("llava", tower_layers=6)
    pixels = torch.randn(2, 3, 16, 16)
    # transformers installs its recorders at the first request and leaves them there: before and behind our hooks.
    for _ in range(2):
        with lmmhooks.wrap(zoo.model, Thin(layers=(1, 3))), torch.no_grad():
            output = zoo.model.model.vision_tower(pixels, output_hidden_states=True)
        assert [states.shape[1] for states in output.hidden_states] == [17, 17, 12, 12, 8, 17, 17]
        assert output.last_hidden_state.shape[1] == 17


def test_nothing_is_left_on_the_model():
    zoo = build("llava", tower_layers=5)
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in zoo.model.named_modules()}
        with lmmhooks.wrap(zoo.model, Thin()) as patch:
            reduced = zoo.model(**inputs).logits
            with patch.disabled():
                assert torch.equal(zoo.model(**inputs).logits, plain)
            assert torch.equal(zoo.model(**inputs).logits, reduced)
        assert torch.equal(zoo.model(**inputs).logits, plain)
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in zoo.model.named_modules()}


def test_a_failed_pass_does_not_reach_the_next():
    zoo = build("llava", tower_layers=5)
    inputs = zoo.inputs(batch=1)
    last = zoo.model.model.vision_tower.encoder.layers[3]

    def fail(module, args):
        raise RuntimeError("out of memory, say")

    with lmmhooks.wrap(zoo.model, Thin(layers=(1, 2))), torch.no_grad():
        expected = zoo.model(**inputs).logits
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="say"):
            zoo.model(**inputs)
        hook.remove()
        assert torch.equal(zoo.model(**inputs).logits, expected)


def test_decoder_counts_the_survivors():
    zoo = build("llava", tower_layers=6)
    with lmmhooks.wrap(zoo.model, Thin(layers=(1, 3))) as patch, torch.no_grad():
        zoo.model(**zoo.inputs(batch=2, images=[2, 1]))
        # 16 -> 11 -> 7 per image.
        assert patch.stats.layers[0].visual_kept == (14, 7)
        zoo.model(**zoo.inputs(batch=1, images=0))
        assert patch.stats.layers[0].visual_kept == (0,)


def test_tokens_of_interpolated_mosaics_survive_by_half():
    """OneVision shrinks large mosaics: a token shows several patches."""
    zoo = build("llava_onevision", tower_layers=6)
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, Thin(layers=(1, 3))), torch.no_grad():
        assert torch.isfinite(zoo.model(**inputs).logits).all()
        state = find_runtime(zoo.model).last
        (span,) = state.layout.spans
        kept = next(v for memory in state._memory.values() for k, v in memory.items() if "tower_kept" in str(k))
    kept = kept[0, span.positions]
    assert ((kept > 0) & (kept < 1)).any(), "this image is meant to be interpolated"
    here = set(state.stages[0].index[0].tolist())
    for position, value, crop in zip(span.positions.tolist(), kept.tolist(), span.tokens.crop.tolist(), strict=True):
        assert (position in here) == (crop >= 0 and value >= 0.5)


def test_pooled_videos_are_refused():
    zoo = build("llava_onevision")
    inputs = zoo.inputs(batch=1, images=0, videos=1)
    with lmmhooks.wrap(zoo.model, Thin(layers=(1,))), torch.no_grad():
        with pytest.raises(lmmhooks.PromptError, match="pools the frames"):
            zoo.model(**inputs)
        assert torch.isfinite(zoo.model(**zoo.inputs(batch=1)).logits).all()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_vl", "is given .* of all patches"),
        ("qwen2_5_vl", "attends inside windows"),
        ("qwen3_vl", "is given .* of all patches"),
        ("internvl", "more than attention and MLP"),
    ],
)
def test_towers_that_need_all_patches_are_refused(family, reason):
    with pytest.raises(lmmhooks.MethodError, match=reason):
        lmmhooks.wrap(build(family).model, Thin(layers=(0,)))


def test_projectors_that_read_several_layers_are_refused():
    zoo = build("llava")
    zoo.model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(lmmhooks.MethodError, match="reads several vision layers"):
        lmmhooks.wrap(zoo.model, Thin(layers=(0,)))


@pytest.mark.parametrize("family", FAMILIES)
def test_more_tokens_than_a_crop_has_are_refused(family):
    with pytest.raises(lmmhooks.MethodError, match="16"):
        lmmhooks.wrap(build(family).model, Thin(keep=17, layers=(0,)))
    with pytest.raises(lmmhooks.MethodError, match="keep=0 is not allowed"):
        Thin(keep=0)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("fastervlm(keep=4)", "reads all patches of the vision tower"),
        ("random(keep=4)", "both remove tokens before the decoder"),
        (ThinOutputs(layers=(0,)), "both remove tokens before the decoder"),
    ],
)
def test_what_contradicts_a_shorter_tower_is_refused(other, reason):
    zoo = build("llava")
    for pair in ((Thin(layers=(0,)), other), (other, Thin(layers=(0,)))):
        with pytest.raises(lmmhooks.MethodError, match=reason):
            lmmhooks.wrap(zoo.model, *pair)


def test_steering_of_the_tower_meets_the_tokens_that_are_left():
    """A direction for all tokens is added to what MLPs return, in the naive tower too."""
    zoo = build("llava", tower_layers=5)
    generator = torch.Generator().manual_seed(3)
    visual = torch.randn(5, 1, 32, generator=generator)
    directions = TensorSet({"textual": torch.zeros(4, 64), "visual": visual})
    steering = lmmhooks.method("vti", directions=directions, factor=0.5, lam_text=0.0)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    with lmmhooks.wrap(zoo.model, steering):
        steered = tower_features(zoo, pixels)
    with lmmhooks.wrap(zoo.model, Thin(layers=(3,)), steering):
        both = tower_features(zoo, pixels)
    with lmmhooks.wrap(zoo.model, Thin(layers=(3,))):
        thin = tower_features(zoo, pixels)
    # Layer 3 is the last before the projector: survivors went through the same layers and the same steering.
    assert not torch.allclose(both, thin)
    same = (both - steered).abs().amax(dim=-1) < 1e-5
    assert (same.sum(dim=1) == 1 + 11).all()


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_composition_with_an_attention_and_a_decoding_method(family):
    zoo = build(family, tower_layers=5)
    inputs = zoo.inputs(batch=2)
    kwargs = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with lmmhooks.wrap(zoo.model, Thin(layers=(1,)), "var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)"):
        together = zoo.model.generate(**inputs, **kwargs)
        alone = [zoo.model.generate(**zoo.row(inputs, row), **kwargs)[:, -3:] for row in range(2)]
    assert torch.equal(together[:, -3:], torch.cat(alone))


def test_survivors_come_first_and_in_order():
    kept = torch.tensor([[0.0, 1.0, 0.5, 0.4], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert survivors(kept).tolist() == [[1, 2, -1, -1], [0, 1, 2, 3], [-1, -1, -1, -1]]


def test_layers_are_ascending():
    assert are_layers([0, 3, 4])
    assert not any(are_layers(layers) for layers in ([], [2, 1], [1, 1], [-1, 0]))
