"""Named shapes keep the sizes of their checkpoints; prompts made for them run through the unmodified model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lmmhooks.bench import shapes
from lmmhooks.bench.prompts import make_prompt
from lmmhooks.errors import LmmhooksError
from tests.zoo import build

# Parameters of the public checkpoints in billions, as their model cards print them.
PUBLISHED = {
    "llava-1.5-7b-shape": 7.06,
    "llava-1.5-13b-shape": 13.35,
    "llava-next-7b-shape": 7.06,
    "llava-onevision-7b-shape": 8.03,
    "qwen2-vl-7b-shape": 8.29,
    "qwen2.5-vl-3b-shape": 3.75,
    "qwen2.5-vl-7b-shape": 8.29,
    "qwen3-vl-8b-shape": 8.77,
    "internvl3-8b-shape": 7.94,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_checkpoint(name) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.build_config(name))
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


def small(name: str) -> str:
    """The structure of a named shape with narrow layers, registered for the test under the same name."""
    chosen = shapes.SHAPES[name]
    text = {**chosen.text, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2}
    if "head_dim" in text:
        text["head_dim"] = 16
    if "rope_parameters" in text:
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    vision = dict(chosen.vision)
    for key in ("hidden_size", "embed_dim"):
        if key in vision:
            vision[key] = 32
    if "embed_dim" in vision:
        vision["hidden_size"] = 64
    for key, value in (
        ("intermediate_size", 32),
        ("num_heads", 2),
        ("num_attention_heads", 2),
        ("out_hidden_size", 64),
    ):
        if key in vision:
            vision[key] = value
    return dataclasses.replace(chosen, text=text, vision=vision)


@pytest.mark.parametrize(
    ("name", "asked", "visual"),
    [
        ("llava-1.5-7b-shape", None, 576),
        ("llava-next-7b-shape", None, 576 + 48 * 48 + 48),
        ("llava-onevision-7b-shape", None, 729 + 54 * 54 + 54),
        ("qwen2-vl-7b-shape", 12, 12),
        ("qwen2.5-vl-3b-shape", 16, 16),
        ("qwen2.5-vl-7b-shape", 35, 35),
        ("qwen3-vl-8b-shape", 16, 16),
        ("internvl3-8b-shape", None, 256),
    ],
)
def test_prompts_run(name, asked, visual, monkeypatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, name, small(name))
    model = shapes.build_model(name, vision_layers=2)
    prompt = make_prompt(model, batch=2, text=10, visual=asked, prefix=3)
    assert (prompt.batch, prompt.text, prompt.visual, prompt.tokens) == (2, 10, visual, 10 + visual)
    is_image = prompt.inputs["input_ids"] == model.config.image_token_id
    assert is_image.sum(1).tolist() == [visual, visual]
    assert is_image[:, 3].all()
    assert not is_image[:, :3].any()
    with torch.no_grad():
        out = model(**prompt.inputs, logits_to_keep=1)
        assert out.logits.shape[:2] == (2, 1)
        assert torch.isfinite(out.logits).all()
        # Random weights have no end token: the whole length is generated, so decode steps can be counted.
        ids = model.generate(**prompt.inputs, max_new_tokens=3)
    assert ids.shape[1] == 10 + visual + 3


def test_text_holds_no_image_tokens_wherever_their_id_stands() -> None:
    """Bundled and hand-made models have their special ids at the start of a small vocabulary."""
    model = build("llava").model
    assert model.config.image_token_id < 8
    prompt = make_prompt(model, batch=8, text=200)
    is_image = prompt.inputs["input_ids"] == model.config.image_token_id
    assert is_image.sum(1).tolist() == [prompt.visual] * 8


def test_special_vision_layers_move_in_proportion() -> None:
    config = shapes.build_config("qwen2.5-vl-7b-shape", layers=2, vision_layers=8)
    assert (config.text_config.num_hidden_layers, config.vision_config.depth) == (2, 8)
    assert config.vision_config.fullatt_block_indexes == [1, 3, 5, 7]


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = shapes.build_model("test-shape", seed=1), shapes.build_model("test-shape", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = shapes.build_model("test-shape", seed=2)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_errors_name_what_is_possible() -> None:
    with pytest.raises(LmmhooksError, match=r"did you mean 'llava-1.5-7b-shape'.*qwen3-vl-8b-shape"):
        shapes.build_config("llava-1.5-7b")
    with pytest.raises(LmmhooksError, match="layers is 0: give 1 or more"):
        shapes.build_config("test-shape", layers=0)
    model = shapes.build_model("test-shape")
    with pytest.raises(LmmhooksError, match="makes 64 visual tokens of this image, not 10: ask for 64"):
        make_prompt(model, visual=10)
    with pytest.raises(LmmhooksError, match="at least 1 prompt and 2 text tokens"):
        make_prompt(model, text=1)
