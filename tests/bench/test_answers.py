"""Whole answers of methods that look first, on a shape without a checkpoint."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.bench.answers import measure_answer
from lmmhooks.bench.processors import build_processor, question
from lmmhooks.bench.shapes import build_config, build_model
from lmmhooks.errors import LmmhooksError
from lmmhooks.prompting import build_inputs
from tests.engines.lookers import noise
from tests.zoo import build


@pytest.fixture(scope="module")
def model():
    return build_model("test-shape")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_prompts_fit_models_of_every_family(family):
    model = build(family, vocab_size=4096).model
    inputs = build_inputs(build_processor(model), [noise(64, 48)], question(9))
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_words_are_tokens_and_differ(model):
    processor = build_processor(model)
    short, long = (build_inputs(processor, [noise(112, 112)], question(n))["input_ids"][0].tolist() for n in (3, 7))
    assert len(long) - len(short) == 4
    assert short.count(model.config.image_token_index) == 64
    place = short.index(model.config.image_token_index) + 64
    assert len(set(long[place:])) == len(long[place:])


def test_looking_costs_what_it_reads(model):
    processor = build_processor(model)
    plain = build_inputs(processor, [noise(150, 120)], question(20))["input_ids"].shape[1]
    cost = measure_answer(model, processor, ["same-image-twice"], question(20), (150, 120), 2, 3)
    assert (cost.positions_plain, cost.positions) == (plain + 2, plain + 64 + 2)
    assert (cost.encoded_plain, cost.encoded) == (1, 1)
    assert cost.ratio.median > 0
    cost = measure_answer(model, processor, ["vicrop-rel(layer=2)"], question(20), (150, 120), 2, 3)
    # The question is read once, the neutral one from where it begins, and the crop with the question behind it.
    assert plain + 64 < cost.positions < 2 * plain + 64
    assert cost.encoded == 2
    assert lmmhooks.wrap(model, "vaf").remove() is None, "nothing is left on the model"


def test_shapes_without_a_processor_are_refused():
    with pytest.raises(LmmhooksError, match="measured on llava and qwen shapes"):
        build_processor(build("internvl").model)
    assert build_config("llava-1.5-7b-shape").model_type == "llava"
