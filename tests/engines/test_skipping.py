"""Layers that leave out computation: what runs in them, on every backend, and beside which methods."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import lmmhooks
from lmmhooks.engines import skipping
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.engines.skipping import prompt_tokens
from lmmhooks.family import resolve
from lmmhooks.methods.attention.base import AttentionMethod
from lmmhooks.methods.reduction.naavit import NAAViT
from lmmhooks.methods.reduction.shortv import ShortV
from lmmhooks.parts import LayerParts
from tests.methods.dense import answer
from tests.methods.rendered import TOLERANCE, equals_rendering, prompts_of, same_bits
from tests.reference.compute import split_rows
from tests.zoo import FAMILIES, IMAGE, build

LAYERS = (1, 2)


def layer_inputs(zoo, inputs, *methods):
    """Input of every decoder layer and of the final norm while a prompt is read."""
    family = resolve(zoo.model)
    seen = []
    with torch.no_grad(), lmmhooks.wrap(zoo.model, *methods):
        hooks = [
            module.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            for module in (*family.layers, family.norm)
        ]
        try:
            zoo.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_states_pass_frozen_layers_bit_for_bit(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    states = layer_inputs(zoo, inputs, ShortV(layers=LAYERS))
    visual = inputs["input_ids"] == IMAGE
    text = (inputs["attention_mask"] == 1) & ~visual
    # Features that a model adds between layers reach frozen states too.
    if not resolve(zoo.model).deepstack_layers:
        assert torch.equal(states[1][visual], states[3][visual])
    assert not torch.equal(states[0][visual], states[1][visual])
    assert (states[1][text] - states[2][text]).abs().amax(dim=-1).min() > 1e-3
    assert all(torch.isfinite(state).all() for state in states)


def test_deepstack_features_are_added_to_frozen_states():
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=1)
    seen = {}
    hook = zoo.model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    states = layer_inputs(zoo, inputs, ShortV(layers=(0, 1)))
    hook.remove()
    visual = inputs["input_ids"] == IMAGE
    for layer, features in enumerate(seen["deepstack_visual_embeds"]):
        assert torch.equal(states[layer + 1][visual], states[layer][visual] + features)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_only_text_rows_pass_the_parts_of_a_frozen_layer(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    layer = zoo.model.model.language_model.layers[1]
    parts = {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "o": layer.self_attn.o_proj, "ffn": layer.mlp}
    rows = {}

    def note(name):
        def forward(module, args, output):
            rows.setdefault(name, []).append(args[0].shape[1])

        return forward

    with lmmhooks.wrap(zoo.model, ShortV(layers=LAYERS)):
        hooks = [module.register_forward_hook(note(name)) for name, module in parts.items()]
        out = zoo.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
        for hook in hooks:
            hook.remove()
    length = inputs["input_ids"].shape[1]
    text = int(((inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()).sum(dim=1).max())
    assert rows == {"q": [text, 1], "k": [length, 1], "o": [text, 1], "ffn": [text, 1]}
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [length + 1] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_without_an_image_are_not_touched(family):
    for method in (ShortV(layers=LAYERS), NAAViT(layers=LAYERS)):
        same_bits(build(family), method, images=0)


@pytest.mark.parametrize("method", [ShortV(layers=LAYERS), NAAViT(layers=LAYERS)], ids=lambda m: m.id)
def test_a_row_without_an_image_is_the_plain_one(method):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[1, 0])
    _, patched = answer(zoo, inputs, method)
    _, plain = answer(zoo, inputs, "attention-identity")
    torch.testing.assert_close(patched[1], plain[1], atol=TOLERANCE, rtol=0)
    assert (patched[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_padding_on_the_right(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, padding="right")
    for method in (ShortV(layers=LAYERS), NAAViT(layers=LAYERS)):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
            logits = zoo.model(**inputs).logits
            for row in range(2):
                valid = inputs["attention_mask"][row].bool()
                alone = zoo.model(**zoo.row(inputs, row)).logits[0]
                torch.testing.assert_close(logits[row, valid], alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("method", [ShortV(layers=LAYERS), NAAViT(layers=LAYERS, vv="self")], ids=lambda m: m.id)
def test_eager_backend(method):
    inputs = build("llava").inputs(batch=2)
    logits = [answer(build("llava", attn=attn), inputs, method)[1] for attn in ("sdpa", "eager")]
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


# The flex path of transformers goes through parts of torch that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("block", [512, 3])
def test_backends_without_a_dense_mask_get_explicit_weights(block, monkeypatch):
    def uncompiled(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    # Compiling the kernel takes minutes and its C++ does not build on every CPU; the semantics are the same.
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(skipping, "ROW_BLOCK", block)
    inputs = build("llava").inputs(batch=2)
    logits = [
        answer(build("llava", attn=attn), inputs, ShortV(layers=LAYERS))[1] for attn in ("sdpa", "flex_attention")
    ]
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["shortv(layers=(1, 2))", "naavit", "yopo(window=3, heads={1: [0]}, layer_cut=3)"])
def test_half_precision(method):
    full, half = build("qwen3_vl"), build("qwen3_vl", dtype=torch.bfloat16)
    logits = []
    with torch.no_grad():
        plain = [zoo.model(**zoo.inputs(batch=2)).logits for zoo in (full, half)]
        for zoo in (full, half):
            with lmmhooks.wrap(zoo.model, method):
                logits.append(zoo.model(**zoo.inputs(batch=2)).logits)
    assert logits[1].dtype == torch.bfloat16
    valid = full.inputs(batch=2)["attention_mask"].bool()
    # About as far from float32 as the plain model is.
    usual = (plain[1][valid] - plain[0][valid]).abs().mean()
    assert (logits[1][valid] - logits[0][valid]).abs().mean() < 1.5 * usual


def test_a_static_cache_is_longer_than_the_prompt():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    for method in (ShortV(layers=LAYERS), NAAViT(layers=LAYERS)):
        _, plain = answer(zoo, inputs, method)
        with lmmhooks.wrap(zoo.model, method):
            out = zoo.model.generate(
                **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, cache_implementation="static",
                output_logits=True, return_dict_in_generate=True, disable_compile=True,
            )  # fmt: skip
        torch.testing.assert_close(torch.stack(out.logits, dim=1), plain, atol=TOLERANCE, rtol=0)


# -- beside other methods ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeaveImage(AttentionMethod):
    """Text rows after the image lose it: no other rows, a visible change."""

    id: ClassVar[str] = "test-leave-image"

    def edit_weights(self, weights, context):
        return weights.masked_fill(context.layout.visual[:, None, None], 0)


@pytest.mark.parametrize("method", [ShortV(layers=LAYERS), NAAViT(layers=LAYERS, vv="none")], ids=lambda m: m.id)
def test_edits_of_text_rows_act_in_the_same_layers(method):
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    prompts = prompts_of(zoo, inputs)

    def weigh(layer, sample, head, query, keys, weights):
        visual = [key for key in keys if prompts.kind(sample, key) == "visual"]
        if prompts.kind(sample, query) == "text" and visual:
            weights[[keys.index(key) for key in visual]] = 0
        return weights

    rendering = {"frozen": LAYERS} if method.id == "shortv" else {}
    if not rendering:
        rendering = {"see": split_rows(prompts, LAYERS, lambda sample, query, key: False)}
    equals_rendering(zoo, inputs, [method, LeaveImage()], prompts, weigh=weigh, **rendering)


@pytest.mark.parametrize("other", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)", "fastv(keep=4)"])
@pytest.mark.parametrize(
    "method",
    [
        "shortv(layers=(1, 2))",
        "naavit(layers=(1, 2))",
        "yopo(heads={1: [0]}, layer_cut=3)",
        "pbs(threshold=0.3, block=2, segment=4)",
    ],
)
def test_rows_of_a_batch_stay_apart_beside_other_methods(method, other):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    tokens, logits = answer(zoo, inputs, method, other)
    _, without = answer(zoo, inputs, method)
    assert (logits - without).abs().max() > 1e-3
    for row in range(2):
        one, alone = answer(zoo, zoo.row(inputs, row), method, other)
        torch.testing.assert_close(logits[row : row + 1], alone, atol=5e-5, rtol=0)
        assert torch.equal(tokens[row : row + 1], one)


def test_layers_freeze_what_a_reduction_left():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "fastv(keep=4)", "shortv(layers=(1, 3))") as patch:
        zoo.model(**inputs)
        rows = find_runtime(zoo.model).last.stage_at(3).layout
        stats = patch.stats
    assert [layer.visual_kept for layer in stats.layers] == [(16, 16), (16, 16), (4, 4), (4, 4)]
    assert int(rows.visual.sum()) == 8
    states = layer_inputs(zoo, inputs, "fastv(keep=4)", "shortv(layers=(1, 3))")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "fastv(keep=4)"):
        zoo.model(**inputs)
    # The final norm sees the full length again: survivors as they entered the frozen layer 3.
    index = rows.visual.nonzero()
    assert len(index) == 8
    entered = states[3][index[:, 0], index[:, 1]]
    assert all((states[4] == state).all(dim=-1).any() for state in entered)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(
    "method",
    [
        "shortv(layers=(1, 3))",
        "naavit(vv='self')",
        "yopo(window=3, heads={2: [0]}, layer_cut=3)",
        "pbs(threshold=0.3, block=2, segment=4)",
        "a-shape(sink=2, window=4, last_rows=3)",
    ],
)
def test_tokens_that_are_hidden_or_removed_come_to_the_same(method, family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    logits = [answer(zoo, inputs, f"fastv(keep=4, mode='{mode}')", method)[1] for mode in ("prune", "mask")]
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)


def test_methods_share_a_model_where_their_layers_differ():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    prompts = prompts_of(zoo, inputs)
    see = split_rows(prompts, (0, 1), lambda sample, query, key: False)
    both = [ShortV(layers=(2, 3)), NAAViT(layers=(0, 1))]
    equals_rendering(zoo, inputs, both, prompts, see=see, frozen=(2, 3))


def test_keys_and_values_of_frozen_layers_may_be_compressed():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, "shortv(layers=(1, 2))", "vl-cache(alpha=0.3)") as patch:
        zoo.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        assert patch.stats.kv_bytes < patch.stats.kv_bytes_full
        assert patch.stats.flops_saved > 0
    with pytest.raises(lmmhooks.MethodError, match="reads or edits the attention of visual tokens in layer 1"):
        lmmhooks.wrap(zoo.model, "shortv(layers=(1, 2))", "look-m")


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        (("shortv(layers=(1,))", "naavit(layers=(1,))"), "both decide what visual tokens compute in layer 1"),
        (
            ("shortv(layers=(2,))", "act(heads='all', skip_layers=())"),
            "reads or edits the attention of visual tokens in",
        ),
        (("naavit(layers=(1,))", "fastv(keep=4, rows='all')"), "fastv reads or edits .* in layer 1"),
        (
            ("shortv(layers=(2,))", "vista(lam=0.5)"),
            "edits what the feed-forward part makes of visual tokens in layer 2",
        ),
    ],
)
def test_methods_that_need_what_is_left_out_are_refused(methods, reason):
    zoo = build("llava")
    for given in (methods, methods[::-1]):
        with pytest.raises(lmmhooks.MethodError, match=reason):
            lmmhooks.wrap(zoo.model, *given)


# -- parts and positions ----------------------------------------------------------------------------------------------


def test_fused_projections_are_refused():
    class FusedAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj, self.o_proj = nn.Linear(4, 12), nn.Linear(4, 4)

    class FusedLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = FusedAttention()

    with pytest.raises(lmmhooks.ModelError, match=r"no query projection of its own .*children are qkv_proj, o_proj"):
        LayerParts.query_projection_of(FusedLayer())


def test_feed_forward_parts_of_another_shape_are_refused(monkeypatch):
    zoo = build("llava")
    mlp = zoo.model.model.language_model.layers[1].mlp
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda hidden: (plain(hidden), None))
    with (
        pytest.raises(lmmhooks.ModelError, match=r"decoder layer 1 does not return states .*shortv cannot freeze"),
        torch.no_grad(),
        lmmhooks.wrap(zoo.model, "shortv(layers=(1,))"),
    ):
        zoo.model(**zoo.inputs(batch=1))


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_unusual_logits_are_refused(name):
    call = SimpleNamespace(kwargs={name: torch.ones(1)})
    with pytest.raises(lmmhooks.ModelError, match=r"decoder layer 3 .* without naavit"):
        skipping._refuse_odd_logits(3, NAAViT(), call, "softcap", "s_aux")


def test_images_that_see_both_ways_are_refused():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "reduction-identity"):
        zoo.model(**inputs)
        layout = find_runtime(zoo.model).last.layout
    causal = torch.ones(length, length).tril().bool()[None, None]
    skipping._refuse_both_ways(layout, SimpleNamespace(dense_mask=causal))
    skipping._refuse_both_ways(
        layout, SimpleNamespace(dense_mask=torch.zeros(1, 1, length, length).where(causal, -1e9))
    )
    with pytest.raises(lmmhooks.PromptError, match="need a causal decoder"):
        skipping._refuse_both_ways(layout, SimpleNamespace(dense_mask=torch.ones_like(causal)))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_prompt_are_those_of_its_columns(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, "reduction-identity"):
        zoo.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        layout = find_runtime(zoo.model).last.stages[0].layout
    for row, (at, tokens) in enumerate(prompt_tokens(layout)):
        ids = inputs["input_ids"][row]
        assert at.tolist() == inputs["attention_mask"][row].nonzero().flatten().tolist(), "neither padding nor answer"
        assert torch.equal(tokens.visual, ids[at] == IMAGE)
        assert tokens.image.unique().tolist() == [-1, 0, 1][: 3 - row]
        assert tokens.placed
        assert len({(i, c, r, k) for i, c, r, k in zip(*(v.tolist() for v in (tokens.image, tokens.crop, tokens.row,
                    tokens.col)), strict=True) if c >= 0}) == int((tokens.crop >= 0).sum())  # fmt: skip
