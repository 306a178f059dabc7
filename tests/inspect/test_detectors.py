"""Each detector on tensors whose answer is known, and the rule that combines them."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.inspect import detectors
from lmmhooks.inspect.detectors import Criteria


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_bounded_and_ignore_scale():
    hidden = gaussian(6, 256)
    hidden[2] = 0
    hidden[2, 17] = 1e4
    score = detectors.sink_scores(hidden, (3, 17))
    # The 1e-6 under the root of the RMS is all that scale can change.
    torch.testing.assert_close(detectors.sink_scores(hidden * 70, (3, 17)), score, rtol=1e-5, atol=1e-5)
    assert float(score.max()) <= math.sqrt(256)
    assert math.isclose(float(score[2]), 16.0, rel_tol=1e-5)
    hidden[2, 3] = -1e4
    assert math.isclose(float(detectors.sink_scores(hidden, (3, 17))[2]), math.sqrt(128), rel_tol=1e-5)
    assert torch.equal(detectors.sink_scores(hidden, None), detectors.sink_scores(hidden, range(256)))


def test_massive_asks_for_magnitude_and_ratio():
    hidden = gaussian(20, 64) * 0.01
    hidden[4, 9] = 50.0  # thousands of times the median, but not large
    hidden[7, 9] = -150.0
    found, peak, median = detectors.massive(hidden, magnitude=100, ratio=1000)
    assert found.nonzero().flatten().tolist() == [7]
    assert float(peak[7]) == 150.0
    assert median == float(hidden.abs().median())
    wide = gaussian(20, 64) * 10
    wide[7, 9] = 150.0  # large, but not against these states
    assert not detectors.massive(wide, 100, 1000)[0].any()
    assert detectors.massive(wide, 100, 10)[0].nonzero().flatten().tolist() == [7]


def test_top_activations_keep_their_sign_and_place():
    hidden = gaussian(5, 8) * 0.1
    hidden[1, 3], hidden[4, 0], hidden[2, 7] = -9.0, 8.0, 7.0
    assert detectors.top_activations(hidden) == [(-9.0, 1, 3), (8.0, 4, 0), (7.0, 2, 7)]


def test_cosine_to_first():
    hidden = gaussian(4, 32)
    hidden[2] = 3 * hidden[0]
    hidden[3] = -hidden[0]
    torch.testing.assert_close(detectors.cosine_to_first(hidden)[[0, 2, 3]], torch.tensor([1.0, 1.0, -1.0]))


def test_received_attention_needs_rows_and_more_than_an_even_share():
    received = torch.full((20,), 0.02)
    received[[3, 18]] = 0.3
    seen = torch.arange(20, 0, -1)
    assert detectors.receives(received, seen, factor=5, min_rows=8).nonzero().flatten().tolist() == [3]
    assert detectors.receives(received, seen, factor=5, min_rows=1).nonzero().flatten().tolist() == [3, 18]
    assert not detectors.receives(received, seen, factor=7, min_rows=1).any()


def test_low_value_needs_both():
    norms = torch.linspace(9.0, 11.0, 20)
    norms[[2, 5]] = 0.5
    received = torch.full((20,), 0.01)
    received[[2, 8]] = 0.4
    seen = torch.full((20,), 32)
    assert detectors.low_value(norms, received, seen, 2.0, 0.1, 8).nonzero().flatten().tolist() == [2]


def test_contribution_equals_the_mean_over_rows_and_heads_one_by_one():
    heads, groups, rows, length, width = 4, 2, 3, 6, 5
    project = torch.nn.Linear(heads * width, 16)
    weights = torch.softmax(gaussian(heads, rows, length), dim=-1)
    values = gaussian(heads // groups, length, width, seed=1)
    with torch.no_grad():
        fast = detectors.contribution(weights.mean(dim=1), values, project)
        for j in range(length):
            total = torch.zeros(16)
            for i in range(rows):
                for h in range(heads):
                    block = project.weight[:, h * width : (h + 1) * width]
                    total += weights[h, i, j] * (block @ values[h // groups, j])
            # float32 sums in another order.
            torch.testing.assert_close(fast[j], (total / rows).norm(), atol=1e-5, rtol=1e-5)


def test_norm_threshold_is_a_fence_that_ordinary_norms_do_not_cross():
    norms = 10 + gaussian(400)
    threshold = detectors.norm_threshold(norms, 3.0, 1.5)
    assert not (norms > threshold).any()
    norms[[4, 90]] = 40.0
    assert (norms > detectors.norm_threshold(norms, 3.0, 1.5)).nonzero().flatten().tolist() == [4, 90]
    # Norms that hardly vary put the fence right above them; the multiple of the median keeps it away.
    assert detectors.norm_threshold(torch.full((9,), 10.0), 3.0, 1.5) == 15.0


def test_magnet_share_counts_rows_that_can_see():
    weights = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.8, 0.1, 0.1, 0.0], [0.0, 0.0, 1.0, 0.0]])
    seen = torch.tensor([3, 3, 2, 0])
    share = detectors.magnet_share(weights, seen, factor=2)
    torch.testing.assert_close(share, torch.tensor([2 / 3, 0.0, 0.5, 0.0]))


def marks(length=4, **where):
    return {name: [i in where.get(name, ()) for i in range(length)] for name in ("D1", "D3", "D4", "D5", "D6")}


@pytest.mark.parametrize(
    ("spoken", "known", "expected"),
    [
        ({"D1": [1]}, True, {1: "unconfirmed"}),
        ({"D1": [1], "D3": [1]}, True, {1: "sink"}),
        ({"D1": [1, 2], "D5": [2]}, True, {1: "unconfirmed", 2: "sink"}),
        ({"D5": [3]}, True, {3: "attention only"}),
        ({"D5": [3], "D6": [3]}, True, {3: "attention only"}),
        ({"D3": [2], "D4": [2]}, True, {}),
        ({"D3": [2]}, False, {2: "unconfirmed"}),
        ({"D4": [2]}, False, {2: "unconfirmed"}),
        ({"D3": [2], "D4": [2]}, False, {2: "sink"}),
        ({"D4": [2], "D5": [2]}, False, {2: "sink"}),
        ({"D1": [0], "D4": [0]}, True, {0: "unconfirmed"}),
        ({"D4": [0]}, False, {}),
    ],
)
def test_no_detector_decides_alone(spoken, known, expected):
    given = marks(**spoken)
    if not known:
        del given["D1"]
    labels = detectors.label(given, known)
    assert {i: label for i, label in enumerate(labels) if label} == expected


@pytest.mark.parametrize(
    "settings", [{"tau": 0}, {"ratio": -1}, {"cosine": 1.5}, {"strong": 0}, {"magnet_rows": 1.2}, {"min_rows": 0}]
)
def test_thresholds_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        Criteria(**settings)
