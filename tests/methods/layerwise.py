"""What the tests of decoding methods that read the decoder share: the same answers as a naive rule, in every loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lmmhooks
from lmmhooks.compat import takes_encoder_outputs
from tests.reference.layers import NaiveReading, Rule, naive_generate
from tests.zoo import VOCAB, Zoo, build

# float32 through four layers in other batches, times weights of at most 4; largest difference seen is 2e-5.
TOLERANCE = 5e-5
STEPS = 4

#: Loops of generate.
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}


def wrapped(zoo: Zoo, inputs: dict[str, Any], *methods: Any, steps: int = STEPS, **kwargs: Any) -> Any:
    """What ``generate`` returns under methods, raw logits included."""
    kwargs = {"do_sample": False, **kwargs}
    with lmmhooks.wrap(zoo.model, *methods):
        return zoo.model.generate(
            **inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **kwargs
        )


def check_logits(family: str, method: Any, rule: Rule, layer: int = 0, **inputs: Any) -> None:
    """The method's logits are those of the rule, and not those of the model."""
    zoo, eager = build(family), build(family, attn="eager")
    given = zoo.inputs(**{"batch": 2, "images": [2, 1], **inputs})
    out = wrapped(zoo, given, method)
    answer = out.sequences[:, given["input_ids"].shape[1] :]
    naive = NaiveReading(eager.model, given, rule, layer)
    plain = NaiveReading(eager.model, given, lambda seen: seen.logits)
    for step, logits in enumerate(out.logits):
        expected = naive.logits(answer[:, :step])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        seen = expected.isfinite()
        if step == 0 and bool((seen.sum(dim=1) > 1).all()):
            moved = (expected - plain.logits(answer[:, :0]))[seen]
            assert moved.std() > 1e-2, "a method that changes nothing proves nothing"


def check_tokens(family: str, mode: str, method: Any, rule: Rule, layer: int = 0) -> None:
    """The method's tokens are those of the rule in a loop of generate."""
    zoo, eager = build(family), build(family, attn="eager")
    if family == "internvl" and mode == "beams" and not takes_encoder_outputs(zoo.model):
        pytest.skip("generate of transformers before 5.20 repeats tiles instead of images for beams")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    torch.manual_seed(0)
    expected = naive_generate(eager.model, inputs, rule, layer, max_new_tokens=STEPS, **MODES[mode])
    with lmmhooks.wrap(zoo.model, method):
        torch.manual_seed(0)
        out = zoo.model.generate(**inputs, max_new_tokens=STEPS, **MODES[mode])
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)


def check_composes(family: str, method: Any) -> None:
    """Beside a reducer and an attention method, rows of a batch equal rows alone, and nothing of a prompt is left."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    for below in ("fastervlm(keep=4)", "fastv(keep=4)", "var(sink_dims='any', tau=2.6, rho=0.3)"):
        both = wrapped(zoo, inputs, below, method)
        without = wrapped(zoo, inputs, method)
        assert not torch.equal(torch.stack(both.logits), torch.stack(without.logits))
        with lmmhooks.wrap(zoo.model, below, method):
            for row in (1, 0):
                one = zoo.model.generate(
                    **zoo.row(inputs, row),
                    max_new_tokens=STEPS,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                for step, logits in enumerate(one.logits):
                    torch.testing.assert_close(logits[0], both.logits[step][row], atol=TOLERANCE, rtol=0)


def check_one_pass(method: Any) -> None:
    """The decoder runs once per step and the tower once."""
    zoo = build("llava")
    calls: list[str] = []
    modules = {"decoder": zoo.model.model.language_model, "tower": zoo.model.model.vision_tower}
    hooks = [m.register_forward_pre_hook(lambda *_, n=name: calls.append(n)) for name, m in modules.items()]
    wrapped(zoo, zoo.inputs(batch=2), method, min_new_tokens=STEPS)
    for hook in hooks:
        hook.remove()
    assert calls.count("decoder") == STEPS
    assert calls.count("tower") == 1


def check_other_loops(method: Any) -> None:
    """Without a cache, and with several drafted tokens per forward: the greedy answer of a method without cut."""
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs()
    # Words of the prompt alone, so that drafts are found there.
    words = inputs["input_ids"][0, -5:-2].tolist()
    others = [token for token in range(VOCAB) if token not in words]
    arguments = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": others}
    drafted = []
    decoder = zoo.model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: drafted.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with lmmhooks.wrap(zoo.model, method):
        plain = zoo.model.generate(**inputs, **arguments)
        assert torch.equal(zoo.model.generate(**inputs, **arguments, use_cache=False), plain)
        drafted.clear()
        assert torch.equal(zoo.model.generate(**inputs, **arguments, prompt_lookup_num_tokens=2), plain)
    hook.remove()
    assert max(drafted[1:]) > 1, "no draft was read"


def check_half_precision(method: Any) -> None:
    """The arithmetic on logits is float32 whatever the weights are."""
    zoo = build("llava", dtype=torch.bfloat16)
    for logits in wrapped(zoo, zoo.inputs(batch=2), method, steps=2).logits:
        assert logits.dtype == torch.float32
        assert logits.isfinite().any(dim=1).all()
        assert not logits.isnan().any()
