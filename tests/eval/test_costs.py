"""Costs: what is noted while generating, and what is made of it."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

from lmmhooks import cost
from lmmhooks.metering import TokenClock, kv_cache_bytes
from lmmhooks_eval.accounting import MemoryMeter
from lmmhooks_eval.costs import summarise
from lmmhooks_eval.effect import dense_effect
from tests.eval.runs import answer, documents

CPU = torch.device("cpu")


def test_clock_separates_the_first_token_from_the_rest() -> None:
    clock, ids = TokenClock(CPU), torch.zeros(2, 5, dtype=torch.long)
    time.sleep(0.02)
    assert not clock(ids, None).any()
    time.sleep(0.01)
    clock(ids, None)
    clock.finish()
    assert clock.steps == 2
    assert clock.prefill_ms >= 20
    assert clock.decode_ms is not None
    assert clock.decode_ms >= 10


def test_one_token_has_no_decode_time() -> None:
    clock = TokenClock(CPU)
    clock(torch.zeros(1, 1, dtype=torch.long), None)
    clock.finish()
    assert clock.decode_ms is None


def test_kv_bytes_are_those_of_every_layers_own_length() -> None:
    cache = DynamicCache()
    for layer, length in enumerate((10, 4)):
        states = torch.zeros(2, 3, length, 8, dtype=torch.bfloat16)
        cache.update(states, states, layer)
    assert kv_cache_bytes(cache) == [2 * 2 * 3 * 10 * 8 * 2, 2 * 2 * 3 * 4 * 8 * 2]
    assert kv_cache_bytes(None) is None


def test_memory_of_nothing_is_not_negative() -> None:
    mib = MemoryMeter(CPU).mib()
    assert mib is None or mib >= 0


def _pass(variant: str, docs: list[dict]) -> list[dict]:
    return [answer(doc, variant, "Yes", batch=index // 4) for index, doc in enumerate(docs)]


def test_summary_counts_batches_once_and_leaves_out_the_first() -> None:
    docs = documents(number=12)
    cost = summarise(_pass("v", docs), _pass("baseline", docs))
    assert cost["batches"] == 2
    assert cost["prefill_ms"]["median"] == pytest.approx(11.5)  # 11 and 12; 10 was the warm-up
    assert cost["decode_tokens_per_s"] == pytest.approx(8 / 0.010)  # one token after the first in each of 8 rows
    assert (cost["visual_in"], cost["visual_kept"]) == (64, 32)
    assert cost["visual_kept_per_layer"] == [32.0] * 8
    assert cost["kv_mib"] == pytest.approx(8 / 8 / 4)
    assert cost["prefill_gflops"] == pytest.approx(0.25)
    assert cost["relative"]["prefill_flops"] == pytest.approx(0.5)
    assert cost["relative"]["kv_bytes"] == pytest.approx(0.5)
    assert cost["relative"]["prefill_time"] == pytest.approx((11 / 21 + 12 / 22) / 2)
    assert cost["relative"]["step_time"] == pytest.approx(1.0)


def test_a_single_batch_is_all_there_is() -> None:
    docs = documents(number=4)
    cost = summarise(_pass("v", docs), _pass("baseline", docs))
    assert cost["batches"] == 1
    assert cost["relative"]["prefill_time"] == pytest.approx(0.5)


def test_one_token_answers_have_no_decode_speed() -> None:
    records = [{**line, "new_tokens": 1, "batch_decode_ms": None} for line in _pass("v", documents(number=8))]
    cost = summarise(records, records)
    assert cost["decode_tokens_per_s"] is None
    assert cost["relative"]["step_time"] is None


def test_batches_split_for_memory_are_batches_of_their_own() -> None:
    lines = _pass("v", documents(number=4))
    halves = [{**line, "batch_size": 2, "batch_prefill_ms": 5.0 + index // 2} for index, line in enumerate(lines)]
    assert summarise(halves, _pass("baseline", documents(number=4)))["batches"] == 1  # the first half warms up
    assert summarise(halves, _pass("baseline", documents(number=4)))["relative"]["prefill_time"] is None


def test_no_answers_no_costs() -> None:
    assert summarise([], []) == {}


def test_the_native_limit_leaves_the_tower_out_of_what_is_saved() -> None:
    docs = documents(number=12)
    baseline = [{**record, "batch_vision_flops": 1e9} for record in _pass("baseline", docs)]
    relative = summarise(_pass("v", docs), baseline)["relative"]
    assert relative["prefill_flops"] == pytest.approx(1 / 2)
    assert relative["prefill_limit"] == pytest.approx((1 + 1) / (2 + 1))
    assert summarise(_pass("v", docs), _pass("baseline", docs))["relative"]["prefill_limit"] is None


def test_the_tower_counts_crops_of_a_fixed_size_and_images_of_any() -> None:
    clip = CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=768, num_hidden_layers=24)
    llava = LlavaConfig(vision_config=clip, text_config=LlamaConfig())
    one = dense_effect(llava, [(640, 576)]).batch["batch_vision_flops"]
    shape = cost.VisionShape.from_config(llava.vision_config)
    assert one == 2 * cost.vision_macs(shape, 576)
    assert dense_effect(llava, [(700, 576), (2944, 2880)]).batch["batch_vision_flops"] == 6 * one
    qwen = Qwen2_5_VLConfig()
    shape = cost.VisionShape.from_config(qwen.vision_config)
    # Four patches are merged into a token.
    assert dense_effect(qwen, [(100, 64)]).batch["batch_vision_flops"] == 2 * cost.vision_macs(shape, 256)
