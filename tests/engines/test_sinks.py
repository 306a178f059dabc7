"""Search for sink channels on models in which they were planted, and on one that has none."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from transformers import BatchFeature

import lmmhooks
from lmmhooks.engines.runtime import Runtime
from lmmhooks.engines.sinks import discover_sink_dims, sink_channels
from lmmhooks.family import resolve
from lmmhooks.methods.attention.var import Var
from tests.planted import plant_text, plant_vision, planted
from tests.zoo import BOS, build

PLANTED = (11, 40)


def plant(model, channels=PLANTED, size=2000.0):
    """
    Give the first token the same huge values in some channels, in every layer.

    Its embedding carries them and nothing else writes to them. Norms rescale each row, so its keys are nearly a
    function of those channels alone, and differ from all others.
    """
    text = model.model.language_model
    with torch.no_grad():
        text.embed_tokens.weight[BOS] *= 0.01
        for channel in channels:
            text.embed_tokens.weight[:, channel] = 0
            text.embed_tokens.weight[BOS, channel] = size
            for layer in text.layers:
                # Nothing else writes to these channels, and what reads them does not drown the rest.
                layer.self_attn.o_proj.weight[channel] = 0
                layer.mlp.down_proj.weight[channel] = 0
                layer.self_attn.v_proj.weight[:, channel] = 0
    return model


@pytest.fixture
def sunk():
    return plant(build("llava", layers=6).model)


def test_planted_channels_are_candidates_and_gaussian_residuals_have_none():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 4096, generator=generator)
    valid = torch.ones(40, dtype=torch.bool)
    assert sink_channels(hidden, valid, tau=20.0) == {}
    hidden[[0, 7], 1415] = 900.0
    hidden[[0, 7], 2533] = -1200.0
    assert sorted(sink_channels(hidden, valid, tau=20.0)) == [1415, 2533]


def test_padding_is_no_anchor():
    hidden = torch.randn(10, 4096, generator=torch.Generator().manual_seed(0))
    hidden[0, 5] = 1e4
    valid = torch.ones(10, dtype=torch.bool)
    valid[0] = False
    assert sink_channels(hidden, valid, tau=20.0) == {}


def test_a_model_without_massive_activations_yields_none_and_wrap_says_so(tmp_path, monkeypatch):
    model = build("llava", layers=6).model
    found = discover_sink_dims(Runtime(resolve(model)))
    assert found.dims == ()
    assert found.evidence["summary"]
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    with pytest.raises(lmmhooks.MethodError, match=r"sink_dims could not be found .* sink_dims='any'"):
        lmmhooks.wrap(model, "var")
    assert not model._forward_pre_hooks, "a refused wrap leaves nothing behind"


def test_search_leaves_the_model_alone(sunk):
    inputs = build("llava", layers=6).inputs(batch=1)
    with torch.no_grad():
        before = sunk(**inputs).logits
        discover_sink_dims(Runtime(resolve(sunk)))
        assert torch.equal(sunk(**inputs).logits, before)
    assert not sunk.model.language_model.layers[3]._forward_pre_hooks


def test_found_channels_are_cached_by_checkpoint_and_used(sunk, tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    expected = discover_sink_dims(Runtime(resolve(sunk)))
    assert set(expected.dims) == set(PLANTED), expected.evidence
    with lmmhooks.wrap(sunk, "var") as patch:
        (method,) = patch.methods
        assert isinstance(method, Var)
        assert set(method.sink_dims) == set(PLANTED)
    (file,) = (tmp_path / ".cache" / "lmmhooks" / "var" / "sink_dims").iterdir()
    record = json.loads(file.read_text())
    record["value"] = [3]
    file.write_text(json.dumps(record))
    with lmmhooks.wrap(sunk, "var") as patch:
        assert patch.methods[0].sink_dims == (3,), "the stored result is used"


class Prompts:
    """Stands in for a processor: prompts of a zoo model, with an image where one is given."""

    chat_template = "none"

    def __init__(self, zoo):
        self.zoo, self.asked = zoo, 0

    def apply_chat_template(self, messages, **kwargs):
        return messages[0]["content"][-1]["text"]

    def __call__(self, text, images=((),), **kwargs):
        self.asked += 1
        return BatchFeature(self.zoo.inputs(images=len(images[0]), text=20, seed=self.asked))


def test_channels_that_come_with_the_image_are_kept_apart():
    zoo = planted(silent=[1, 4, 6, 9, 11, 14])
    found = discover_sink_dims(Runtime(resolve(zoo.model)), Prompts(zoo))
    assert set(found.dims) == {11, 40}
    assert found.visual_dims == ()
    assert found.evidence["images"] == 4
    # Without the sink of the first token the same channels stand out only where the projector wrote them.
    zoo = plant_vision(plant_text(build("llava", layers=6), first=False), silent=[1, 4, 6, 9, 11, 14])
    found = discover_sink_dims(Runtime(resolve(zoo.model)), Prompts(zoo))
    assert found.dims == ()
    assert set(found.visual_dims) == {11, 40}, found.evidence


def test_channels_of_one_image_alone_are_not_found():
    zoo = plant_vision(plant_text(build("llava", layers=6), first=False), silent=[1, 4, 6, 9, 11, 14])
    processor = Prompts(zoo)
    once = zoo.model.model.multi_modal_projector
    # The massive unit fires for the first image only: what a second image does not repeat is no property of the model.
    seen = []

    def silence(module, args, output):
        seen.append(1)
        return output if len(seen) == 1 else output.index_fill(-1, torch.tensor([11, 40]), 0.0)

    handle = once.register_forward_hook(silence)
    found = discover_sink_dims(Runtime(resolve(zoo.model)), processor)
    handle.remove()
    assert len(seen) == 4
    assert found.dims == found.visual_dims == ()
    assert {row["image_share"] for row in found.evidence["candidates"] if row["channel"] in (11, 40)} == {0.25}


def test_models_with_normed_queries_are_judged_by_ratios_only():
    plain, normed = build("qwen2_5_vl", layers=6), build("qwen3_vl", layers=6)
    for zoo, expected in ((plain, False), (normed, True)):
        assert discover_sink_dims(Runtime(resolve(zoo.model))).evidence["ratios_only"] is expected


def test_a_search_keeps_the_position_offset_of_a_generation_under_way():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(images=2, text=9)  # the search shows one image at a time, whose offset is another
    with torch.no_grad():
        token = inputs["input_ids"][:, -1:]
        expected = zoo.model(input_ids=token, past_key_values=zoo.model(**inputs).past_key_values).logits
        cache = zoo.model(**inputs).past_key_values
        discover_sink_dims(Runtime(resolve(zoo.model)), Prompts(zoo))
        assert torch.equal(zoo.model(input_ids=token, past_key_values=cache).logits, expected)
