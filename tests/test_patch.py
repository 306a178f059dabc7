"""Wrapping and unwrapping: order, nesting, errors, and no trace left."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.methods.attention.identity import AttentionIdentity
from lmmhooks.methods.attention.var import Var
from tests.zoo import FAMILIES, build

VAR = Var(sink_dims="any", tau=2.6, min_visual=0.0, rho=0.0)


def trace(model):
    """Everything a patch could leave behind: modules, hooks, instance attributes, attention backends."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: type(module) for name, module in modules.items()},
        "hooks": {
            name: (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_hooks_with_kwargs))
            for name, m in modules.items()
        },
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "methods": {name: sorted(k for k, v in vars(m).items() if callable(v)) for name, m in modules.items()},
        "backends": {
            name: vars(m.config).get("_attn_implementation_internal")
            for name, m in modules.items()
            if hasattr(m, "config")
        },
    }


@pytest.fixture
def zoo():
    made = build("llava")
    # transformers installs hooks of its own the first time hidden states are asked for: have them in place already.
    with torch.no_grad():
        made.model(**made.inputs(batch=1), output_hidden_states=True)
    return made


def logits(zoo, inputs):
    with torch.no_grad():
        return zoo.model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_leaves_no_trace(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        zoo.model(**inputs, output_hidden_states=True)
    plain, before = logits(zoo, inputs), trace(zoo.model)
    patch = lmmhooks.wrap(zoo.model, VAR)
    assert not torch.equal(logits(zoo, inputs), plain)
    assert trace(zoo.model) != before
    patch.remove()
    assert trace(zoo.model) == before
    assert torch.equal(logits(zoo, inputs), plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_identity_is_bit_identical(family, attn):
    zoo = build(family, attn=attn)
    inputs = zoo.inputs(batch=2)
    plain = logits(zoo, inputs)
    with lmmhooks.wrap(zoo.model, "attention-identity") as patch:
        assert patch.attached
        assert torch.equal(logits(zoo, inputs), plain)


def test_disabled_is_the_untouched_model(zoo):
    inputs = zoo.inputs(batch=2)
    plain = logits(zoo, inputs)
    with lmmhooks.wrap(zoo.model, VAR) as patch:
        patched = logits(zoo, inputs)
        with patch.disabled():
            assert patch.attached == []
            assert torch.equal(logits(zoo, inputs), plain)
            with patch.disabled():
                assert torch.equal(logits(zoo, inputs), plain)
            assert torch.equal(logits(zoo, inputs), plain), "leaving the inner block must not re-enable"
        assert torch.equal(logits(zoo, inputs), patched)


def test_unordered_removal(zoo):
    inputs = zoo.inputs(batch=1)
    before, plain = trace(zoo.model), logits(zoo, inputs)
    outer = lmmhooks.wrap(zoo.model, "attention-identity")
    with lmmhooks.wrap(zoo.model, VAR):
        alone = logits(zoo, inputs)
        outer.remove()
        assert torch.equal(logits(zoo, inputs), alone), "the inner patch must survive the outer one"
    assert trace(zoo.model) == before
    assert torch.equal(logits(zoo, inputs), plain)


def test_wrapping_while_another_patch_is_disabled(zoo):
    inputs = zoo.inputs(batch=1)
    first = lmmhooks.wrap(zoo.model, VAR)
    with first.disabled():
        second = lmmhooks.wrap(zoo.model, "attention-identity")
    both = logits(zoo, inputs)
    second.remove()
    assert torch.equal(logits(zoo, inputs), both)
    first.remove()
    assert not zoo.model._forward_pre_hooks


def test_remove_is_idempotent_and_unwrap_removes_everything(zoo):
    before = trace(zoo.model)
    patch = lmmhooks.wrap(zoo.model, VAR)
    lmmhooks.wrap(zoo.model, AttentionIdentity())
    lmmhooks.unwrap(zoo.model)
    patch.remove()
    lmmhooks.unwrap(zoo.model)
    assert trace(zoo.model) == before
    assert "removed" in repr(patch)


def test_the_same_method_twice_is_refused_and_the_first_stays(zoo):
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, VAR):
        patched = logits(zoo, inputs)
        with pytest.raises(lmmhooks.MethodError, match="already on this model"):
            lmmhooks.wrap(zoo.model, VAR)
        assert torch.equal(logits(zoo, inputs), patched)


def test_removal_after_an_exception_inside_a_forward(zoo):
    inputs = zoo.inputs(batch=1)
    before, plain = trace(zoo.model), logits(zoo, inputs)
    layer = zoo.model.model.language_model.layers[2]

    def fail(*args):
        raise RuntimeError("boom")

    def fail_inside():
        with lmmhooks.wrap(zoo.model, VAR):
            handle = layer.mlp.register_forward_hook(fail)
            try:
                logits(zoo, inputs)
            finally:
                handle.remove()

    with pytest.raises(RuntimeError, match="boom"):
        fail_inside()
    assert trace(zoo.model) == before
    assert torch.equal(logits(zoo, inputs), plain)


def test_a_failed_forward_does_not_disturb_the_next(zoo):
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, VAR):
        good = logits(zoo, inputs)
        short = {"input_ids": inputs["input_ids"][:, 8:], "attention_mask": None}
        with pytest.raises(lmmhooks.PromptError, match=r"has \d+ image tokens but its images give 16 features"):
            logits(zoo, {**inputs, **short})
        with pytest.raises(lmmhooks.PromptError, match="no image was given"):
            logits(zoo, {"input_ids": inputs["input_ids"]})
        with pytest.raises(lmmhooks.PromptError, match="image tokens but its images"):
            zoo.model.generate(**{**inputs, **short}, max_new_tokens=2)
        assert torch.equal(logits(zoo, inputs), good)


def test_a_cache_of_another_time_is_refused(zoo):
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        cache = zoo.model(**inputs, use_cache=True).past_key_values
    with lmmhooks.wrap(zoo.model, VAR), pytest.raises(lmmhooks.PromptError, match="not read under this patch"):
        zoo.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def test_interleaved_generations_keep_their_own_state(zoo):
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    token = first["input_ids"][:, -1:]

    def step(cache):
        return zoo.model(input_ids=token, past_key_values=cache).logits

    with torch.no_grad(), lmmhooks.wrap(zoo.model, VAR):
        alone = step(zoo.model(**first, use_cache=True).past_key_values)
        one = zoo.model(**first, use_cache=True).past_key_values
        other = zoo.model(**second, use_cache=True).past_key_values
        step(other)
        assert torch.equal(step(one), alone)


def test_stats_need_a_prompt_first_and_then_describe_it(zoo):
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, VAR) as patch:
        with pytest.raises(lmmhooks.MethodError, match="no prompt has run"):
            patch.stats  # noqa: B018
        logits(zoo, inputs)
        stats = patch.stats
    assert stats.average_visual == 16
    assert stats.flops_saved == 0
    assert stats.layers[0].moved is None
    assert 0 < stats.layers[2].moved <= 1
    assert stats.to_dict()["layers"][0]["visual_in"] == (16, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("varr", r"unknown method 'varr'; did you mean 'var'\?"),
        ("var(q=1)", "no hyper-parameter 'q'"),
        ("var(p=2)", r"p=2 is not allowed; p must be in \[0, 1\]"),
        ("var(p=", "cannot read method"),
        ("var(0.5)", "key=value"),
        ("var(preset='papr')", "no preset 'papr'.*did you mean 'paper'"),
        ({"var": {}, "identity": {}}, "one key"),
        (3, "not int"),
    ],
)
def test_bad_methods_are_one_line(zoo, spec, message):
    with pytest.raises(lmmhooks.MethodError, match=message) as caught:
        lmmhooks.wrap(zoo.model, spec)
    assert "\n" not in str(caught.value)
    assert not zoo.model._forward_pre_hooks


def test_wrap_without_methods_and_without_a_model():
    with pytest.raises(lmmhooks.MethodError, match="at least one method"):
        lmmhooks.wrap(build("llava").model)
    with pytest.raises(lmmhooks.ModelError):
        lmmhooks.wrap(torch.nn.Linear(2, 2), "var")
