"""A trace on every family: rows and probabilities are those of one eager forward over prompt and answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lmmhooks
from lmmhooks.comparison.trace import lead
from lmmhooks.engines.runtime import find_runtime
from tests.zoo import FAMILIES, IMAGE, build

ANSWER = (20, 31, 42, 20)
# One row of float32 attention, by another kernel.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


class Letters:
    """A tokenizer for ids that stand for nothing."""

    def decode(self, ids, **_) -> str:
        return "".join(f"<{int(i)}>" for i in (ids if isinstance(ids, (list, tuple)) else [ids]))


PROCESSOR = SimpleNamespace(tokenizer=Letters())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_an_eager_forward(family) -> None:
    zoo, plain = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=1, images=2)
    with lmmhooks.wrap(zoo.model, "attention-identity"):
        trace = lead(find_runtime(zoo.model), inputs, ANSWER, PROCESSOR)
    length = inputs["input_ids"].shape[1]
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ANSWER])], dim=1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in longer:
        longer["mm_token_type_ids"] = torch.nn.functional.pad(longer["mm_token_type_ids"], (0, len(ANSWER)))
    with torch.inference_mode():
        out = plain.model(**longer, output_attentions=True)
    rows = torch.stack([layer[0, :, length - 1 : -1].mean(dim=0) for layer in out.attentions], dim=1)
    visual = longer["input_ids"][0] == IMAGE
    torch.testing.assert_close(trace.visual, rows[..., visual], **CLOSE)
    torch.testing.assert_close(trace.shares[..., 1], rows[..., visual].sum(dim=-1), **CLOSE)
    torch.testing.assert_close(trace.shares.sum(dim=-1), torch.ones(len(ANSWER), 4), **CLOSE)
    logp = out.logits[0, length - 1 : -1].log_softmax(dim=-1)
    torch.testing.assert_close(trace.distribution, logp, rtol=1e-3, atol=1e-3)
    assert trace.tokens == ANSWER
    assert trace.texts[0] == "<20>"
    assert trace.images.unique().tolist() == [0, 1]
    assert len(trace.images) == int(visual.sum())


def test_the_model_is_left_as_it_was() -> None:
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=1)
    with torch.inference_mode():
        before = zoo.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with lmmhooks.wrap(zoo.model, "fastv(keep=4)") as patch:
            attached = patch.attached
            lead(find_runtime(zoo.model), inputs, ANSWER, PROCESSOR, keep_distribution=False)
            assert patch.attached == attached
        after = zoo.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(before, after)
