"""VL-SAM: the flow against dense products, maps against full forwards, points by hand, and SAM with random weights."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamConfig, SamModel, SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.geometry import CellGrid, Geometry
from lmmhooks.methods.refinement.flow import column_factors, flow_rows, head_weights, weighted_mean
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.refinement.vl_sam import (
    Pair,
    Segmenter,
    VlSam,
    center,
    load_sam,
    on_grid,
    point_pair,
    positive_region,
)
from lmmhooks.prompting import Prompter, answer
from tests.methods.looked import looked, models, picture  # noqa: F401 # fixtures
from tests.reference import vl_sam as naive

ASK = "Describe the image."


def causal(layers, heads, length, seed=0):
    logits = torch.randn(
        layers, heads, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.double
    )
    return list(logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(dim=-1))


# -- flow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularise", ["layer", "final", "none"])
def test_rows_of_the_flow_are_those_of_the_dense_product(regularise):
    attentions = causal(4, 3, 9)
    dense = naive.flow([attention.float() for attention in attentions], regularise)
    folded = [weighted_mean(attention, head_weights(attention)).float() for attention in attentions]
    # Float32 products of four layers.
    torch.testing.assert_close(flow_rows(folded, [8, 2, 5], regularise), dense[[8, 2, 5]], rtol=1e-5, atol=1e-6)
    assert bool((dense.triu(1) == 0).all()), "nothing flows from later positions"


def test_factors_and_weights():
    factors = column_factors(5)
    assert float(factors[0]) == pytest.approx(1 / 5)
    assert float(factors[-1]) == 1.0
    for attention in causal(3, 4, 7, seed=1):
        weights = head_weights(attention)
        assert bool(((weights > 0) & (weights <= 1)).all())
    # One head at a time is all heads at once.
    one_by_one = sum(weighted_mean(head[None], head_weights(head[None])) for head in attention) / len(attention)
    torch.testing.assert_close(one_by_one, weighted_mean(attention, head_weights(attention)))


def test_positions_that_see_only_themselves_leave_no_map():
    folded = [torch.eye(6) * 0.7] * 3
    row = flow_rows(folded, [5])[0]
    assert bool((row[:5] == 0).all())
    assert float(row[5]) > 0


# -- points -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_positive_region_is_the_largest_blob(seed):
    grid = torch.rand(7, 9, generator=torch.Generator().manual_seed(seed))
    above = [1.0, 1.3, 1.7][seed % 3]
    region = positive_region(grid, above)
    blob = naive.largest_blob(grid.double().tolist(), above)
    assert {tuple(cell) for cell in np.argwhere(region).tolist()} == blob
    pair = point_pair(grid, region)
    values = grid.tolist()
    assert values[pair.positive[0]][pair.positive[1]] == max(values[r][c] for r, c in blob)
    rest = [(r, c) for r in range(7) for c in range(9) if (r, c) not in blob]
    assert pair.negative == min(rest, key=lambda cell: values[cell[0]][cell[1]])


def test_regions_at_the_edges_of_what_there_is():
    grid = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert positive_region(grid, 100.0).tolist() == [[False, True], [False, False]]
    assert point_pair(grid, np.ones((2, 2), dtype=bool)) == Pair((0, 1), None)


def test_cells_and_pixels():
    box = (-20.0, 0.0, 120.0, 60.0)
    assert center((0, 0), (3, 7), box) == (-10.0, 10.0)
    mask = np.zeros((60, 100), dtype=bool)
    mask[20:40, 0:21] = True
    assert np.argwhere(on_grid(mask, (3, 7), box)).tolist() == [[1, 1]]


# -- on models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularise", ["layer", "final"])
def test_maps_are_those_of_one_full_forward(models, picture, monkeypatch, regularise):  # noqa: F811
    model, eager, processor = models
    spec = f"vl-sam(regularise='{regularise}', max_new_tokens=12)"
    text, found, shown = looked(monkeypatch, model, processor, spec, picture, ASK)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASK}]}], add_generation_prompt=True
    )
    inputs = processor(images=[picture], text=[inputs], return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    flow, places = naive.answer_flow(eager, processor, picture, ASK, new, regularise)
    pieces = [processor.tokenizer.decode([token], skip_special_tokens=True) for token in new]
    # Every word of the closed world is one token; these are the ones that mean nothing.
    words = [re.sub(r"\W", "", piece).lower() for piece in pieces]
    meant = [place for place, word in enumerate(words) if word not in ("", "the", "a", "an", "two", "and", "in")]
    listed = [place for place, word in enumerate(words) if word in ("two",)]
    rows = [flow.shape[0] - len(new) + place for place in sorted({*meant, *listed})]
    expected = flow[rows][:, places].mean(dim=0)
    # Float32 forwards that sum in another order, through eight layers of products.
    torch.testing.assert_close(found.values, expected.double(), rtol=1e-4, atol=1e-6 * float(expected.max()))
    grid, box = found.grid()
    blob = naive.largest_blob(grid.tolist(), 1.0)
    high, wide = (box[3] - box[1]) / grid.shape[0], (box[2] - box[0]) / grid.shape[1]
    rows_, columns = [cell[0] for cell in blob], [cell[1] for cell in blob]
    left, right = box[0] + min(columns) * wide, box[0] + (max(columns) + 1) * wide
    top, bottom = box[1] + min(rows_) * high, box[1] + (max(rows_) + 1) * high
    crop = picture.crop(tuple(round(side) for side in (left, top, right, bottom)))
    assert [image.tobytes() for image in shown] == [picture.tobytes(), crop.tobytes()]
    assert text == answer(model, processor, [picture, crop], ASK, max_new_tokens=4)


def test_things_may_be_named_in_answer_to_something_else(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    question = "What is the color of the circle?"
    _, own, _ = looked(monkeypatch, model, processor, "vl-sam", picture, question)
    text, named, shown = looked(monkeypatch, model, processor, f"vl-sam(naming='{ASK}')", picture, question)
    _, direct, _ = looked(monkeypatch, model, processor, "vl-sam", picture, ASK)
    assert torch.equal(named.values, direct.values)
    assert not torch.equal(named.values, own.values)
    assert text == answer(model, processor, shown, question, max_new_tokens=4)


def test_an_answer_without_words_is_no_map(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    monkeypatch.setattr("lmmhooks.methods.refinement.vl_sam.content_pieces", lambda pieces, find: [False] * len(pieces))
    _, found, shown = looked(monkeypatch, model, processor, "vl-sam", picture, ASK)
    assert float(found.values.sum()) > 0, "all of its text counts"
    assert len(shown) == 2
    end = processor.tokenizer.eos_token_id
    monkeypatch.setattr(
        "lmmhooks.engines.looking.Looker._generate",
        lambda self, *args, **kwargs: self._reply([end], torch.zeros(1, 10)),
    )
    with lmmhooks.wrap(model, "vl-sam", processor=processor) as patch:
        engine = patch._runtime.answering
        look = engine.asker(Prompter(processor), picture, ASK, {})
        look._geometry = found.geometry
        assert float(patch.methods[0].saliency(look).values.abs().sum()) == 0


def test_no_image_and_several(models, picture):  # noqa: F811
    model, _, processor = models
    with lmmhooks.wrap(model, "vl-sam", processor=processor) as patch:
        with pytest.raises(PromptError, match="one image"):
            patch.answer([picture, picture], ASK, max_new_tokens=2)
        text = patch.answer(None, ASK, max_new_tokens=2)
    assert text == answer(model, processor, None, ASK, max_new_tokens=2)


@pytest.mark.parametrize("size", [(90, 400), (12, 8)])
def test_images_of_extreme_shape(models, size):  # noqa: F811
    model, _, processor = models
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    with lmmhooks.wrap(model, "vl-sam", processor=processor) as patch:
        assert isinstance(patch.answer(image, ASK, max_new_tokens=2), str)
        shown = patch._runtime.answering.looked_at
    assert all(side >= 1 for view in shown for side in view.size)


# -- SAM --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A folder with a tiny SAM of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    config = SamConfig(
        vision_config={
            **sizes,
            "output_channels": 16,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [0],
            "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**sizes, "iou_head_hidden_dim": 16, "attention_downsample_rate": 1},
    )
    folder = str(tmp_path_factory.mktemp("sam"))
    SamModel(config).save_pretrained(folder)
    prepare = SamImageProcessorPil(
        size={"longest_edge": 64},
        mask_size={"longest_edge": 32},
        pad_size={"height": 64, "width": 64},
        mask_pad_size={"height": 32, "width": 32},
    )
    SamProcessor(prepare).save_pretrained(folder)
    return folder


GRID = torch.tensor([[0.1, 0.2, 0.1, 0.0], [0.1, 0.9, 0.8, 0.1], [0.0, 0.6, 0.1, 0.3]])


def test_sam_is_given_the_pair_then_its_mask_then_a_pair_inside(sam, picture, monkeypatch):  # noqa: F811
    segmenter = load_sam(sam)
    calls = []
    original = SamModel.forward

    def forward(self, *args, **kwargs):
        calls.append(kwargs)
        out = original(self, *args, **kwargs)
        # The right half, whatever random weights say.
        out.pred_masks = torch.where(torch.arange(out.pred_masks.shape[-1]) >= 16, 1.0, -1.0).expand_as(out.pred_masks)
        return out

    monkeypatch.setattr(SamModel, "forward", forward)
    width, height = picture.size
    mask = segmenter.refined(picture, GRID, (0.0, 0.0, float(width), float(height)), 1.0)
    first, again, inside = calls
    # The longer side is 64 pixels for SAM; one column of the map is 65 of the picture's, one row 50.
    scale = 64 / width
    expected = torch.tensor([[[[1.5 * width / 4, 75.0], [3.5 * width / 4, 25.0]]]]) * scale
    torch.testing.assert_close(first["input_points"].float(), expected, atol=0.3, rtol=0)
    assert first["input_labels"].tolist() == [[[1, 0]]]
    assert first["input_masks"] is None
    assert torch.equal(again["input_points"], first["input_points"])
    assert again["input_masks"].shape[-2:] == (16, 16) or again["input_masks"].shape[-2:] == (32, 32)
    # Inside the right half, 0.8 is the largest value.
    assert float(inside["input_points"][0, 0, 0, 0]) == pytest.approx(2.5 * width / 4 * scale, abs=0.3)
    assert inside["input_masks"] is None
    assert mask.shape == (height, width)
    assert not mask[:, : width // 2 - 5].any()
    assert mask[:, width // 2 + 5 :].all()


def test_the_box_of_the_mask_is_cut_out(sam, models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    found = np.zeros((picture.height, picture.width), dtype=bool)
    found[30:60, 100:140] = True
    monkeypatch.setattr(Segmenter, "refined", lambda self, image, grid, box, above: found)
    _, _, shown = looked(monkeypatch, model, processor, f"vl-sam(sam={sam!r})", picture, ASK)
    assert shown[1].tobytes() == picture.crop((100, 30, 140, 60)).tobytes()
    # SAM may find nothing; then the region of the map is shown.
    found[:] = False
    _, _, shown = looked(monkeypatch, model, processor, f"vl-sam(sam={sam!r})", picture, ASK)
    _, _, plain = looked(monkeypatch, model, processor, "vl-sam", picture, ASK)
    assert shown[1].tobytes() == plain[1].tobytes()


def test_sam_runs_as_it_is(sam, models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    text, _, shown = looked(monkeypatch, model, processor, f"vl-sam(sam={sam!r})", picture, ASK)
    assert text == answer(model, processor, shown, ASK, max_new_tokens=4)


def test_sam_that_is_not_there_is_refused_at_wrap(models, tmp_path):  # noqa: F811
    model, _, processor = models
    with pytest.raises(MethodError, match="give the folder or hub id of a SAM model"):
        lmmhooks.wrap(model, f"vl-sam(sam={str(tmp_path)!r})", processor=processor)


def test_regions_in_padding_leave_a_pixel():
    grid = CellGrid(torch.arange(16).view(4, 4), (0.0, -50.0, 200.0, 150.0), "image")
    values = torch.zeros(16)
    values[0] = 1.0
    saliency = Saliency(values, Geometry((200, 100), 16, (grid,)))
    shown = VlSam().refined(Image.new("RGB", (200, 100)), saliency)
    assert min(shown.size) >= 1


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"regularise": "twice"}, {"above": -1}, {"show": "none"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        VlSam(**settings)
