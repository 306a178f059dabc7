"""More rows than there is room for: the estimate against what a prompt takes, and the refusal before anything runs."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks import cost
from lmmhooks.bench.memory import peak_bytes
from lmmhooks.engines import memory
from lmmhooks.errors import PromptError
from lmmhooks.family import resolve
from tests.zoo import build

SHAPE = cost.DecoderShape(layers=2, width=8, kv_width=4, ffn_width=16, vocabulary=100)


def test_the_estimate_counts_rows_tokens_and_layers():
    needed = cost.prompt_memory(SHAPE, rows=4, length=10, rows_at_once=2, bytes_per_element=2)
    # Two layers of keys and values, four wide; in a forward three states and three inner products.
    assert needed.cache == 4 * 10 * 2 * 2 * 4 * 2
    assert needed.activations == 2 * 10 * (3 * 8 + 3 * 16) * 2
    assert needed.total == needed.cache + needed.activations
    assert needed.batch_that_fits(2, needed.total) == 2
    assert needed.batch_that_fits(2, needed.total - 1) == 1
    assert needed.batch_that_fits(2, needed.total // 2 - 1) == 0
    with pytest.raises(ValueError, match="0 rows"):
        cost.prompt_memory(SHAPE, rows=0, length=10, rows_at_once=1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_estimate_is_a_close_lower_bound(name, batch):
    zoo = build(name)
    family = resolve(zoo.model)
    embeds = torch.randn(batch, 600, family.hidden_size)

    @torch.no_grad()
    def run():
        # As a caller that makes the embeddings and keeps them.
        family.text_model(inputs_embeds=embeds.clone(), past_key_values=DynamicCache(), use_cache=True)

    seen = peak_bytes(run, torch.device("cpu"))
    shape = cost.DecoderShape.from_config(family.text_config)
    needed = cost.prompt_memory(shape, batch, 600, batch, bytes_per_element=4)
    # Rotary tables, and keys and values repeated for their heads, are left out.
    assert 0.6 * seen < needed.total <= seen


def limit(monkeypatch, available):
    monkeypatch.setattr(memory, "available_bytes", lambda devices: available)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_batch_with_no_room_is_refused_before_the_decoder_runs(name, monkeypatch):
    zoo = build(name)
    ran = []
    zoo.model.model.language_model.register_forward_pre_hook(lambda module, args: ran.append(1))
    five = zoo.inputs(batch=5, text=5)
    length = five["input_ids"].shape[1]
    shape = cost.DecoderShape.from_config(resolve(zoo.model).text_config)
    limit(monkeypatch, cost.prompt_memory(shape, 6, length, 6, 4).total)
    with lmmhooks.wrap(zoo.model, "vcd"):
        with pytest.raises(PromptError, match=rf"vcd reads 10 rows of {length} tokens \(2 for each of 5\)") as error:
            zoo.model.generate(**five, max_new_tokens=2)
        assert "cpu has" in str(error.value)
        assert "a batch of 3 would fit" in str(error.value)
        assert "\n" not in str(error.value)
        assert not ran
        # What it says is true, also of beams, which are rows as well.
        zoo.model.generate(**zoo.inputs(batch=3, text=5), max_new_tokens=2)
        zoo.model.generate(**zoo.inputs(batch=1, text=5), max_new_tokens=2, num_beams=3)
        with pytest.raises(PromptError, match="reads 8 rows"):
            zoo.model.generate(**zoo.inputs(batch=4, text=5), max_new_tokens=2)
        with pytest.raises(PromptError, match="reads 8 rows"):
            zoo.model.generate(**zoo.inputs(batch=2, text=5), max_new_tokens=2, num_beams=2)


def test_one_prompt_that_does_not_fit_and_what_is_not_counted(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs()
    limit(monkeypatch, 1000)
    with lmmhooks.wrap(zoo.model, "vdd(token=9)"), pytest.raises(PromptError, match=r"3 for each of 1.*not one prompt"):
        zoo.model.generate(**inputs, max_new_tokens=1)
    # A reducer shortens prompts before they are stacked up, by how much is not known yet.
    with lmmhooks.wrap(zoo.model, "fastervlm(keep=4)", "vcd"):
        zoo.model.generate(**inputs, max_new_tokens=1)
    # Nothing can be said about a device that does not tell.
    limit(monkeypatch, None)
    with lmmhooks.wrap(zoo.model, "vcd"):
        zoo.model.generate(**inputs, max_new_tokens=1)


def test_lazy_branches_count_what_they_read_themselves(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs()
    shape = cost.DecoderShape.from_config(resolve(zoo.model).text_config)
    limit(monkeypatch, cost.prompt_memory(shape, 1, inputs["input_ids"].shape[1], 1, 4).total)
    with lmmhooks.wrap(zoo.model, "m3id(lazy=True)"):
        zoo.model.generate(**inputs, max_new_tokens=1)
    with lmmhooks.wrap(zoo.model, "m3id"), pytest.raises(PromptError, match="reads 2 rows"):
        zoo.model.generate(**inputs, max_new_tokens=1)


def test_what_devices_have():
    here = memory.available_bytes([torch.device("cpu")])
    assert here is None or here > 1 << 28
    assert memory.available_bytes([torch.device("meta")]) is None
