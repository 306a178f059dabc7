"""The shipped models: they load offline with stock classes, batch exactly, and answer as their cards say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, Qwen2_5_VLProcessor

from lmmhooks_eval.tiny import data_dir, load_model, load_processor, model_dir
from lmmhooks_eval.tiny.card import model_card
from lmmhooks_eval.tiny.evaluate import Answerer, evaluate_captions, evaluate_pope, evaluate_vqa
from lmmhooks_eval.tiny.loading import MODELS

SUBSET = 24
"""Scenes in the accuracy tests."""


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def answerer(name: str) -> Iterator[Answerer]:
    threads = torch.get_num_threads()
    yield Answerer(model_dir(name), data_dir())
    torch.set_num_threads(threads)


def lines(task: str, scenes: int) -> list[dict[str, str]]:
    rows = [json.loads(row) for row in (data_dir() / f"scenes_{task}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if int(Path(row["image"]).stem) < scenes]


def test_folder_is_small_and_complete(name: str) -> None:
    folder = model_dir(name)
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "metrics.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_stock_classes_and_settings(name: str) -> None:
    model, processor = load_model(name)
    expected = {"tiny-llava": LlavaProcessor, "tiny-qwen": Qwen2_5_VLProcessor}[name]
    assert isinstance(processor, expected)
    assert type(model).__module__.startswith("transformers.models.")
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert "_attn_implementation" not in (model_dir(name) / "config.json").read_text()
    stored = AutoModelForImageTextToText.from_pretrained(model_dir(name))
    assert stored.dtype == torch.bfloat16
    assert stored.get_input_embeddings().weight.data_ptr() == stored.get_output_embeddings().weight.data_ptr()


def test_llava_loads_with_the_stock_auto_processor() -> None:
    folder = model_dir("tiny-llava")
    stock, ours = AutoProcessor.from_pretrained(folder), load_processor(folder)
    assert stock.patch_size == ours.patch_size == 14
    assert stock.vision_feature_select_strategy == ours.vision_feature_select_strategy == "default"
    assert stock.num_additional_image_tokens == ours.num_additional_image_tokens == 1


def test_left_padded_batch_equals_single_prompts(answerer: Answerer) -> None:
    pope, caption = lines("pope", 4), lines("caption", 4)
    questions = [pope[0]["question"], caption[1]["prompt"], pope[7]["question"], caption[3]["prompt"]]
    images = [pope[0]["image"], caption[1]["image"], pope[7]["image"], caption[3]["image"]]
    together = answerer.answer(questions, images)
    assert together == [answerer.answer([q], [i])[0] for q, i in zip(questions, images, strict=True)]
    batch = answerer.inputs(questions, images)
    with torch.no_grad():
        padded = answerer.model(**batch).logits[:, -1]
        alone = [
            answerer.model(**answerer.inputs([q], [i])).logits[0, -1] for q, i in zip(questions, images, strict=True)
        ]
    # Float32, other batch shapes; logits of size 10.
    torch.testing.assert_close(padded, torch.stack(alone), atol=1e-4, rtol=0)


def test_existence_is_in_its_band_and_needs_the_image(answerer: Answerer) -> None:
    probes = [line for line in lines("pope", SUBSET) if line["split"] != "popular"]
    seen = evaluate_pope(answerer, probes, "image")
    for split in ("random", "adversarial"):
        # Wide enough for 140 probes (standard error .025), visibly below 1 and far from the controls.
        assert 0.80 < seen[split]["accuracy"]["value"] < 0.995
        assert seen[split]["unparsed"] == 0
    wrong = evaluate_pope(answerer, [line for line in probes if line["split"] == "random"], "wrong_image")
    assert wrong["random"]["accuracy"]["value"] < 0.75


def test_other_tasks_beat_language_alone(answerer: Answerer) -> None:
    questions = [line for line in lines("vqa", SUBSET) if line["type"] in ("colour", "count")]
    seen, blind = (evaluate_vqa(answerer, questions, condition) for condition in ("image", "text_only"))
    for kind in seen:
        assert seen[kind]["value"] > blind[kind]["value"] + 0.05, kind


def test_captions_are_well_formed(answerer: Answerer) -> None:
    result = evaluate_captions(answerer, lines("caption", 12), "image")
    assert result["malformed"] <= 1
    assert result["recall"] > 0.6


def test_card_is_up_to_date(name: str) -> None:
    folder = model_dir(name)
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(folder)


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown bundled model 'tiny-clip'; choose one of tiny-llava, tiny-qwen"):
        model_dir("tiny-clip")
