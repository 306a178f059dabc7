"""Attention maps of the bundled models, from the call to the numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.inspect import attention_map
from lmmhooks.inspect.localisation import faithfulness, localise
from lmmhooks.inspect.maps.extract import KINDS
from lmmhooks.inspect.maps.tam import rank_gaussian
from lmmhooks.prompting import build_inputs
from lmmhooks_eval.tiny.loading import data_dir
from tests.reference import maps

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def picture():
    image = Image.new("RGB", (90, 60), (255, 255, 255))
    image.paste((220, 30, 30), (60, 10, 80, 30))
    image.paste((30, 30, 220), (10, 30, 30, 50))
    return image


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def loaded(request):
    return lmmhooks.load(request.param, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llava():
    return lmmhooks.load("tiny-llava", device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_maps_every_token(kind, loaded, picture):
    model, processor = loaded
    settings = {"block": 4} if kind == "occlusion" else {}
    found = attention_map(model, processor, picture, QUESTION, kind=kind, max_new_tokens=4, **settings)
    assert find_runtime(model) is None, "nothing stays on the model"
    n = found.geometry.num_tokens
    assert found.values.shape == (len(found.tokens), n)
    assert bool(found.values.isfinite().all())
    assert found.values.std() > 0
    layers = len(found.kept)
    assert found.span_shares.shape == (len(found.tokens), layers, 4)
    torch.testing.assert_close(found.span_shares.sum(dim=-1), torch.ones(len(found.tokens), layers), atol=1e-5, rtol=0)
    assert bool((found.entropy <= math.log(n) + 1e-5).all())
    assert found.plane(0).shape == (60, 90)
    # What is centre-cropped away is never seen.
    assert bool(found.plane().isnan().any()) == (model.config.model_type == "llava")
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["answer"] == found.answer != ""
    assert "".join(token.text for token in found.tokens).strip() == found.answer
    assert all(token.rank == 1 and 0 < token.probability <= 1 for token in found.tokens)


def test_the_answer_is_that_of_the_model_alone(loaded, picture):
    model, processor = loaded
    inputs = build_inputs(processor, [picture], QUESTION)
    alone = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = attention_map(model, processor, picture, QUESTION, max_new_tokens=6)
    assert found.answer_ids == tuple(alone.tolist())


def test_layers_heads_and_tokens_are_chosen(llava, picture):
    model, processor = llava
    whole = attention_map(model, processor, picture, QUESTION, keep_heads=True, max_new_tokens=3)
    assert whole.by_head.shape[1:] == (len(whole.layers), len(whole.heads), whole.values.shape[1])
    part = attention_map(
        model, processor, picture, QUESTION, layers=[1, 2], heads=0, tokens=[-1], keep_heads=True, max_new_tokens=3
    )
    assert (part.layers, part.heads) == ((1, 2), (0,))
    assert [token.index for token in part.tokens] == [len(part.answer_ids) - 1]
    torch.testing.assert_close(part.by_head[0, :, 0], whole.by_head[-1, 1:3, 0])
    # Half precision in the rows of heads.
    torch.testing.assert_close(part.values[0], whole.by_head[-1, 1:3, 0].float().mean(dim=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(whole.by_layer.mean(dim=1), whole.values)


def test_within_an_image_a_map_sums_to_one(llava, picture):
    model, processor = llava
    for kind in ("raw", "tam"):
        found = attention_map(model, processor, picture, QUESTION, kind=kind, normalise="within", max_new_tokens=2)
        torch.testing.assert_close(found.values.sum(dim=1), torch.ones(len(found.tokens)))


def test_relative_to_the_question_itself_is_one(llava, picture):
    model, processor = llava
    found = attention_map(
        model, processor, picture, QUESTION, kind="relative", neutral_prompt=QUESTION, max_new_tokens=2
    )
    torch.testing.assert_close(found.values[0], torch.ones_like(found.values[0]), rtol=1e-6, atol=0)
    assert found.settings["neutral_prompt"] == QUESTION


@pytest.mark.parametrize("kind", ["raw", "grad", "tam", "occlusion"])
def test_one_of_several_images_is_mapped(kind, loaded, picture):
    model, processor = loaded
    settings = {"block": 7} if kind == "occlusion" else {}
    shown = [picture, picture.rotate(180).resize((60, 80))]
    each = [
        attention_map(model, processor, shown, QUESTION, kind=kind, image_index=i, max_new_tokens=2, **settings)
        for i in (0, 1)
    ]
    assert [found.geometry.size for found in each] == [(90, 60), (60, 80)]
    assert each[0].answer == each[1].answer
    torch.testing.assert_close(each[0].span_shares, each[1].span_shares)
    assert all(bool(found.values.isfinite().all()) for found in each)
    assert each[0].values.shape != each[1].values.shape or not torch.equal(each[0].values, each[1].values)


@pytest.mark.parametrize("how", ["drop", "median"])
def test_sinks_are_taken_out(how, llava, picture):
    """A method that looks at one cell makes it a sink."""
    from tests.inspect.maps.test_rows import AllOnOne

    model, processor = llava
    plain = attention_map(model, processor, picture, QUESTION, max_new_tokens=1)
    position = int(plain.geometry.num_tokens // 2)
    first = int(
        (build_inputs(processor, [picture], QUESTION)["input_ids"][0] == model.config.image_token_id).int().argmax()
    )
    with lmmhooks.wrap(model, AllOnOne(position=first + position)):
        raw = attention_map(model, processor, picture, QUESTION, max_new_tokens=1)
        clean = attention_map(model, processor, picture, QUESTION, max_new_tokens=1, sink_filter=how)
    assert raw.sinks.nonzero().flatten().tolist() == [position]
    assert raw.sink_share == pytest.approx(1.0)
    assert float(raw.values[0, position]) == pytest.approx(1.0)
    assert float(clean.values[0, position]) == 0.0, "nothing is left beside the sink"
    assert not bool(plain.sinks[position])


def test_maps_of_a_reduced_prompt_leave_out_what_is_gone(loaded, picture):
    model, processor = loaded
    with lmmhooks.wrap(model, "fastv(keep=6, layer=1)"):
        found = attention_map(model, processor, picture, QUESTION, layers=[2], max_new_tokens=2, normalise="within")
        tam = attention_map(model, processor, picture, QUESTION, kind="tam", max_new_tokens=2)
    assert int(found.kept[2].sum()) == 6
    assert torch.equal(found.values[0].isnan(), ~found.kept[2])
    assert torch.equal(tam.values[0].isnan(), ~found.kept[2])
    torch.testing.assert_close(found.values.nansum(dim=1), torch.ones(len(found.tokens)))
    assert found.to_dict()["values"][0].count(None) == found.values.shape[1] - 6
    assert found.plane(0).isnan().any()


def test_token_activation_is_that_of_the_loops(loaded, picture):
    model, processor = loaded
    official = attention_map(model, processor, picture, QUESTION, kind="tam", official=True, max_new_tokens=3)
    found = attention_map(model, processor, picture, QUESTION, kind="tam", max_new_tokens=3)
    inputs = build_inputs(processor, [picture], QUESTION)
    new, ids = list(found.answer_ids), inputs["input_ids"][0].tolist()
    with torch.no_grad():
        logits = model(**maps.continued(inputs, new[:-1])).logits[0].float().numpy()
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    question = processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    start = next(i for i in range(visual[-1], len(ids)) if ids[i : i + len(question)] == question)
    text = [*range(start, start + len(question)), *range(len(ids) - 1, len(ids) - 1 + len(new))]
    words = [*question, *new]
    for t in range(len(new)):
        for result, quirk in ((found, False), (official, True)):
            k = t
            if quirk and t == 0:
                # The map of the prompt's first token.
                k = -len(question)
            expected = maps.tam(logits, visual, text, [*words, ids[-1]] if quirk else words, len(question), k, quirk)
            [grid] = result.geometry.grids
            values = rank_gaussian(torch.from_numpy(expected)[grid.index])
            np.testing.assert_allclose(result.values[t][grid.index].numpy(), values.numpy(), atol=1e-4)


def records(name):
    return [json.loads(line) for line in (data_dir() / name).read_text(encoding="utf-8").splitlines()]


def test_a_model_looks_at_what_it_is_asked_about(llava):
    model, processor = llava
    scenes = {scene["image"]: scene for scene in records("scenes.jsonl")[:6]}
    found = []
    for asked in records("scenes_vqa.jsonl"):
        if asked["type"] != "colour" or asked["image"] not in scenes:
            continue
        [thing] = [
            thing for thing in scenes[asked["image"]]["objects"] if f" {thing['category']}?" in asked["question"]
        ]
        image = Image.open(data_dir() / asked["image"])
        raw = attention_map(model, processor, image, asked["question"], max_new_tokens=1)
        found.append(localise(raw.geometry, raw.values[0], thing["box"]))
    assert len(found) >= 6
    # An object takes up about a fiftieth of the image.
    assert np.mean([one.pointing for one in found]) > 0.3
    assert np.mean([one.ratio for one in found]) > 2


def test_an_answer_depends_on_what_occlusion_finds(llava):
    model, processor = llava
    [asked] = [one for one in records("scenes_vqa.jsonl")[:20] if one["question"] == "What color is the crab?"][:1]
    image = Image.open(data_dir() / asked["image"])
    hidden = attention_map(model, processor, image, asked["question"], kind="occlusion", block=2, max_new_tokens=1)
    curves = faithfulness(model, processor, image, hidden, steps=5, seeds=2, t=0)
    # One picture in a batch or several: sums in another order.
    assert curves.deletion[0] == curves.insertion[-1] == pytest.approx(math.log(hidden.tokens[0].probability), abs=1e-4)
    assert curves.deletion[-1] == curves.insertion[0]
    assert all(len(curve) == 6 for curve in (*curves.random_deletion, *curves.random_insertion))
    assert curves.better_than_random
    json.dumps(curves.to_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tom"}, "no map is of kind 'tom'; did you mean 'tam'"),
        ({"epsilon": 1.0}, "kind 'raw' has no setting 'epsilon'; it has none"),
        ({"kind": "tam", "windw": 5}, "has no setting 'windw'; did you mean 'window'"),
        ({"kind": "tam", "window": 2}, "window=2 is not allowed; it must be an odd number"),
        ({"kind": "tam", "layers": [1]}, "reads no attention"),
        ({"kind": "flow", "regularise": "often"}, "regularise='often' is not allowed"),
        ({"neutral_prompt": "Describe."}, "kind 'raw' has no setting 'neutral_prompt'"),
        ({"layers": [99]}, r"layers is \[99\]; give one or more numbers from 0 to"),
        ({"heads": []}, r"heads is \[\]"),
        ({"tokens": [9]}, r"tokens is \[9\]; the answer has"),
        ({"normalise": "both"}, "normalise is 'both'"),
        ({"image_index": 1}, "image number 1 is to be mapped, but 1 images were given"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message, llava, picture):
    model, processor = llava
    with pytest.raises(lmmhooks.LmmhooksError, match=message) as refused:
        attention_map(model, processor, picture, QUESTION, max_new_tokens=2, **settings)
    assert "\n" not in str(refused.value)
    assert find_runtime(model) is None


def test_a_map_needs_an_image(llava):
    model, processor = llava
    with pytest.raises(lmmhooks.PromptError, match="no image was given"):
        attention_map(model, processor, None, QUESTION)
