"""Functions of maps on numbers that are known: token activation maps, words, sinks, occlusion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from lmmhooks.geometry import CellGrid
from lmmhooks.inspect.maps.measures import favouring, sinks_of, within_image
from lmmhooks.inspect.maps.occlusion import blocks, covered, filling, spread
from lmmhooks.inspect.maps.tam import activation, interference, joint_min_max, rank_gaussian, without_interference
from lmmhooks.inspect.maps.words import content_of, group_words, merge_words
from tests.reference import maps


@pytest.mark.parametrize("shape", [(5, 7), (2, 9), (24, 24)])
def test_rank_filter_is_that_of_sorted_windows(shape):
    image = np.random.default_rng(0).random(shape)
    image[0, :2] = 0.0
    found = rank_gaussian(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(found, maps.rank_gaussian(image), atol=1e-12)


def test_rank_filter_keeps_even_windows_and_takes_a_lone_spike_out():
    flat = torch.full((4, 4), 0.3)
    torch.testing.assert_close(rank_gaussian(flat), flat.double())
    assert torch.equal(rank_gaussian(torch.zeros(3, 3)), torch.zeros(3, 3, dtype=torch.float64))
    spike = flat.clone()
    spike[2, 2] = 0.4
    # Nearly even windows: hardly more than their median.
    assert float(rank_gaussian(spike)[2, 2]) == pytest.approx(0.3, abs=1e-3)


def test_what_is_taken_off_is_what_fits_best():
    generator = torch.Generator().manual_seed(0)
    values, disturbing = torch.rand(2, 40, generator=generator)
    scale = float(np.linalg.lstsq(disturbing[:, None].numpy(), values.numpy(), rcond=None)[0][0])
    torch.testing.assert_close(without_interference(values, disturbing), (values - scale * disturbing).clamp(min=0))
    assert float(without_interference(3 * disturbing, disturbing).max()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(without_interference(values, torch.zeros(40)), values)


def test_interference_is_a_weighted_mean():
    found = interference(torch.eye(3), torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75, 0.0]), atol=1e-7, rtol=0)
    assert torch.equal(interference(torch.eye(2), torch.zeros(2)), torch.zeros(2))


def test_image_and_text_share_one_range():
    found = joint_min_max(torch.tensor([1.0, 3.0]), torch.tensor([5.0]))
    assert found.tolist() == [0.0, 0.5]
    assert joint_min_max(torch.ones(2), torch.ones(1)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("t", [0, 2])
def test_activation_of_a_token_is_that_of_the_loops(t, official):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20, 11)).astype(np.float32)
    visual, text, words = list(range(3, 12)), [13, 14, 15, 17, 18, 19], [4, 5, 4, 9, 5, 3]
    ids = [int(logits[13].argmax()), *words[1:]]
    if official:
        ids[3] = 8
    scores = torch.from_numpy(logits.T[ids]).clamp(min=0)
    found = activation(scores[:, visual], scores[3 + t, text], words, 3 + t, 3)
    expected = maps.tam(logits, visual, text, ids if official else words, 3, t, False)
    if official:
        # The reference compares tokens by what is explained; words stay those of the answer.
        expected = maps.tam(logits, visual, text, [*words, 8], 3, t, True)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_tokens_are_joined_to_words():
    texts = ["", "The", " gira", "ffe", "'s", " red", ".", " 1", "7"]
    words = group_words(texts)
    assert [(word.text, word.tokens) for word in words] == [
        ("The", (1,)),
        ("giraffe", (2, 3)),
        ("'", (4,)),
        ("red", (5,)),
        (".", (6,)),
        ("17", (7, 8)),
    ]
    assert [word.text for word in words if word.is_content] == ["giraffe", "red", "17"]
    assert content_of(words, len(texts)) == (2, 5, 7)
    values = torch.arange(9.0)[:, None]
    assert merge_words(values, words)[:, 0].tolist() == [1.0, 2.5, 4.0, 5.0, 6.0, 7.5]


def test_an_answer_without_content_words_is_averaged_whole():
    assert content_of(group_words(["", "Yes", "."]), 3) == (1, 2)
    assert content_of(group_words([""]), 1) == (0,)


def test_sinks_are_favoured_in_half_of_the_pairs():
    shares = torch.tensor([[0.6, 0.1, 0.0], [0.6, 0.2, 0.0]])
    favoured = favouring(shares, num_keys=40)
    assert favoured.tolist() == [2, 1, 0], "an even share is 0.025, and 5 of them 0.125"
    assert sinks_of(favoured, pairs=2).tolist() == [True, True, False]
    assert sinks_of(favoured, pairs=4).tolist() == [True, False, False]
    assert sinks_of(torch.tensor([math.nan]), pairs=0).tolist() == [False]


def test_within_an_image_values_sum_to_one():
    found = within_image(torch.tensor([[1.0, 3.0, math.nan], [0.0, 0.0, 0.0]]))
    assert found[0, :2].tolist() == [0.25, 0.75]
    assert bool(found[0, 2].isnan())
    assert found[1].tolist() == [0.0, 0.0, 0.0]


def test_blocks_tile_the_grid():
    grid = CellGrid(torch.arange(15).view(3, 5), (10.0, 0.0, 60.0, 30.0), "image")
    boxes = blocks(grid, 2)
    assert len(boxes) == 6
    assert boxes[0] == (10.0, 0.0, 30.0, 20.0)
    assert boxes[-1] == (50.0, 20.0, 60.0, 30.0)
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) == 50 * 30
    cells = torch.tensor([[10.0, 0, 20, 10], [50, 20, 60, 30], [0, 0, 8, 8], [math.nan] * 4], dtype=torch.float64)
    found = spread(torch.arange(6.0), boxes, cells)
    assert found[:2].tolist() == [0.0, 5.0]
    assert bool(found[2:].isnan().all())


@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_only_what_is_covered_changes(fill):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    shown = np.asarray(covered(image, [(4.2, 3.0, 9.6, 8.0), (-5.0, -5.0, -1.0, -1.0)], filling(image, fill)))
    changed = (shown != pixels).any(axis=2)
    outside = np.ones_like(changed)
    outside[3:8, 4:10] = False
    assert not changed[outside].any()
    assert changed[3:8, 4:10].mean() > 0.9
    if fill == "mean":
        assert shown[4, 5] == pytest.approx(pixels.reshape(-1, 3).mean(axis=0), abs=0.5)
