"""Packed training equals single-turn prompts, on the unmodified model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lmmhooks_eval.tiny import questions as ask
from lmmhooks_eval.tiny.adapters import make_adapter
from lmmhooks_eval.tiny.batches import NUM_SLOTS, PromptPacker, answer_loss, draw_scenes, scene_questions
from lmmhooks_eval.tiny.models import MODELS
from lmmhooks_eval.tiny.packing import Packing, pack_rows, packed_attention, register_attention


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_blockwise_attention_equals_the_dense_mask(kv_heads: int) -> None:
    packing = Packing(prefix=5, groups=((3, 4), (1, 6)))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, packing.length, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, packing.length, 8, generator=generator) for _ in range(2))
    packed, _ = packed_attention(torch.nn.Module(), query, key, value, None, packing=packing)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=packing.dense_mask(), enable_gqa=True
    )
    # Same sums in another order, float32.
    torch.testing.assert_close(packed, dense.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["image", "stripped", "template"])
def test_packed_loss_equals_single_turn_loss(name: str, mode: str) -> None:
    torch.manual_seed(0)
    register_attention()
    adapter = make_adapter(name)
    stock = copy.deepcopy(adapter.model).eval()  # taken before training attention is switched on
    adapter.use_training_attention()
    adapter.model.eval()
    packer = PromptPacker(name, adapter.tokenizer)
    scenes, images = draw_scenes((4,), 1)
    questions = scene_questions(scenes[0], np.random.default_rng(0))
    caption = ask.caption(scenes[0])
    with torch.no_grad():
        pixels = adapter.pixel_values(images)
        ids, labels, packing = packer.pack([questions], [caption], mode)
        states = adapter.packed_states(ids, adapter.see(pixels) if mode == "image" else None, packing)
        packed = answer_loss(states, labels, adapter.model.lm_head)

        prefixes = {
            "image": packer.image_prefix,
            "stripped": packer.stripped_prefix,
            "template": packer.template_prefix,
        }
        losses, tokens = [], 0
        for question in [*questions[:NUM_SLOTS], caption]:
            prompt, answer = packer.encode(question, packer.lead if mode == "template" else "")
            row = torch.tensor([prefixes[mode] + prompt + answer])
            inputs = {"input_ids": row}
            if mode == "image":
                inputs["pixel_values"] = pixels
            if mode == "image" and name == "tiny-qwen":
                inputs["image_grid_thw"] = torch.tensor([[1, 16, 16]])
                inputs["mm_token_type_ids"] = (row == adapter.image_token_id).int()
            logits = stock(**inputs).logits[0, -len(answer) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            tokens += len(answer)
    assert tokens == int((labels >= 0).sum())
    # Float32 through eight layers in another order of summation; measured difference below 1e-6.
    torch.testing.assert_close(packed, torch.stack(losses).sum() / tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_training_pixels_equal_the_image_processor(name: str) -> None:
    from lmmhooks_eval.tiny.processors import build_image_processor

    adapter = make_adapter(name)
    _, images = draw_scenes((6,), 2)
    processed = build_image_processor(name)(images=list(images), return_tensors="pt")["pixel_values"]
    # The processor rescales before it normalises, in float32 as well: a few units in the last place.
    torch.testing.assert_close(adapter.pixel_values(images), processed, atol=1e-5, rtol=0)


def test_overlong_question_is_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens but the slot holds 4"):
        pack_rows(Packing(2, ((1, 4),)), [7, 7], [[([1, 2, 3], [4, 5])]], pad_id=0)


def test_attention_without_packing_is_refused() -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="needs packing"):
        packed_attention(torch.nn.Module(), states, states, states, None)
