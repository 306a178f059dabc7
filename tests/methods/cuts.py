"""Holds reducers that cut inside the decoder against their naive rendering, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from tests.engines.reducers import visual_groups
from tests.reference.attention import positions_of
from tests.reference.reduction import Choose, reduced_logits
from tests.zoo import Zoo, build

__all__ = ["KWARGS", "SEVERAL", "STEPS", "TOLERANCE", "equals_rendering", "kept", "same_bits"]

#: float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5
STEPS = 3
SEVERAL = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"]
KWARGS: dict[str, Any] = {
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def equals_rendering(
    family: str,
    methods: Any,
    cuts: Callable[[Zoo, dict[str, Any], int, list[list[int]]], dict[int, Choose]],
    *,
    renumber: bool = False,
    **inputs: Any,
) -> None:
    """
    Logits of every position of the prompt and of the steps that follow are those of `reduced_logits`.

    ``cuts(zoo with eager attention, inputs, row, numbers of each image's tokens)`` is asked anew for every pass, since
    renderings remember what they saw. The default inputs are two rows, the first with two images and left padding.
    """
    methods = methods if isinstance(methods, (list, tuple)) else [methods]
    zoo, eager = build(family), build(family, attn="eager")
    batch = zoo.inputs(**({"batch": 2, "images": [1, 2]} | inputs))
    assert not batch["attention_mask"].all(), "rows of equal length would not be padded"
    with torch.no_grad():
        plain = zoo.model(**batch).logits
        with lmmhooks.wrap(zoo.model, *methods):
            # Numbered as `generate` does: a plain forward counts padding, which what is chosen may depend on.
            positions = positions_of(zoo.model, batch)
            prefill = zoo.model(**batch, **({} if positions is None else {"position_ids": positions})).logits
            out = zoo.model.generate(**batch, **KWARGS)
    answer = out.sequences[:, batch["input_ids"].shape[1] :]
    logits = torch.stack(out.logits, dim=1)
    for row in range(len(prefill)):
        images = visual_groups(eager.model, batch, row)
        assert (prefill[row, -1] - plain[row, -1]).abs().max() > 1e-3, "what changes nothing proves nothing"

        def rendered(row=row, images=images):
            return {layer: (choose, renumber) for layer, choose in cuts(eager, batch, row, images).items()}

        expected = reduced_logits(eager.model, batch, row, rendered())
        valid = batch["attention_mask"][row].bool()
        torch.testing.assert_close(prefill[row, valid], expected, atol=TOLERANCE, rtol=0)
        steps = reduced_logits(eager.model, batch, row, rendered(), answer[:, :-1])[-STEPS:]
        torch.testing.assert_close(logits[row], steps, atol=TOLERANCE, rtol=0)


def same_bits(family: str, method: Any, **inputs: Any) -> None:
    """A method changes no bit, neither of a prompt nor of its answer."""
    zoo = build(family)
    batch = zoo.inputs(**({"batch": 2} | inputs))
    with torch.no_grad():
        plain, answer = zoo.model(**batch).logits, zoo.model.generate(**batch, **KWARGS)
        with lmmhooks.wrap(zoo.model, method):
            assert torch.equal(zoo.model(**batch).logits, plain)
            patched = zoo.model.generate(**batch, **KWARGS)
    assert torch.equal(patched.sequences, answer.sequences)
    assert torch.equal(torch.stack(patched.logits), torch.stack(answer.logits))


def kept(zoo: Zoo, inputs: dict[str, Any], *methods: Any) -> list[set[int]]:
    """Per decoder layer, the prompt positions row 0 enters it with."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, *methods):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    whole = set(range(inputs["input_ids"].shape[1]))
    stages = [state.stage_at(layer).index for layer in range(len(zoo.model.model.language_model.layers))]
    return [whole if index is None else set(index[0].tolist()) - {-1} for index in stages]
