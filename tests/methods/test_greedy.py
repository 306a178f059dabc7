"""Greedy subsets: beginnings of each other, the same in every group, exact in number whatever repeats."""

from __future__ import annotations

import pytest
import torch

from lmmhooks.methods.reduction import greedy
from lmmhooks.methods.reduction.greedy import cosine, cover, max_min, spanning
from tests.reference import diversity


def features(groups=3, size=20, width=8, seed=0):
    return torch.randn(groups, size, width, generator=torch.Generator().manual_seed(seed))


def by_distance(x, num_keep):
    return max_min(1 - cosine(x), num_keep)


def by_determinant(x, num_keep):
    return spanning(cosine(x), num_keep)


def by_coverage(x, num_keep):
    return cover(cosine(x), num_keep)


def by_volume(x, num_keep):
    return spanning(x @ x.transpose(1, 2), num_keep)


def by_product(x, num_keep):
    return cover(x @ x.transpose(1, 2), num_keep)


CHOICES = [by_distance, by_determinant, by_coverage]


@pytest.mark.parametrize("choose", CHOICES)
def test_smaller_selections_are_beginnings_of_larger_ones(choose):
    x = features(width=32)
    order = choose(x, 20)
    assert torch.equal(order.sort(dim=1).values, torch.arange(20).expand(3, -1)), "all tokens, each once"
    for num_keep in (1, 2, 7):
        assert torch.equal(choose(x, num_keep), order[:, :num_keep])


@pytest.mark.parametrize("choose", CHOICES)
def test_groups_do_not_see_each_other(choose):
    x = features()
    together = choose(x, 6)
    for group in range(3):
        assert torch.equal(choose(x[group : group + 1], 6)[0], together[group])


@pytest.mark.parametrize("choose", CHOICES)
def test_length_of_a_vector_does_not_matter(choose):
    x = features()
    # Powers of two, which change no digit.
    scale = 2.0 ** torch.randint(-4, 5, (3, 20, 1), generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(x * scale, 6), choose(x, 6))


@pytest.mark.parametrize("choose", CHOICES)
def test_the_order_of_tokens_does_not_matter(choose):
    x = features()
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    # Of vectors of one length, all are as good as the first, and of two that resemble only each other, both.
    choose = {by_determinant: by_volume, by_coverage: by_product}.get(choose, choose)
    assert torch.equal(shuffle[choose(x[:, shuffle], 6)], choose(x, 6))


@pytest.mark.parametrize("choose", CHOICES)
def test_identical_and_empty_tokens_are_chosen_once_and_late(choose):
    x = features(groups=1, size=6, width=16)
    x = torch.cat([x, x, torch.zeros(1, 1, 16)], dim=1)
    order = choose(x, 13)[0].tolist()
    assert sorted(order) == list(range(13))
    distinct = [i % 6 for i in order if i < 12]
    assert sorted(distinct[:6]) == list(range(6)), "a duplicate before the last original"
    same = choose(torch.ones(1, 5, 4), 3)[0].tolist()
    assert len(set(same)) == 3


def test_more_tokens_than_dimensions_stay_finite_and_unique():
    order = spanning(cosine(features(width=4)), 15)
    assert all(len(set(row.tolist())) == 15 for row in order)
    # The first four span everything; each adds less volume than the one before.
    kernel = cosine(features(width=4))[0].double()
    volumes = [torch.linalg.slogdet(kernel[order[0, :k]][:, order[0, :k]]).logabsdet for k in range(5)]
    gains = torch.stack(volumes).diff()
    assert (gains.diff() <= 1e-6).all()


def test_gains_in_coverage_never_grow():
    similarity = cosine(features(size=30))
    order = cover(similarity, 30)
    covered = torch.zeros(31, 3)
    for k in range(1, 31):
        chosen = similarity.gather(1, order[:, :k, None].expand(-1, -1, 30))
        covered[k] = chosen.amax(dim=1).clamp(min=0).sum(dim=1)
    gains = covered.diff(dim=0)
    assert (gains >= 0).all()
    # Sums of 30 float32 cosines, each to 1e-7.
    assert (gains.diff(dim=0) <= 1e-5).all()


@pytest.mark.parametrize("seed", range(4))
def test_both_ways_to_cover_choose_as_loops_do(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 25, 18, generator=generator)
    factor, offset = torch.rand(2, 2, 18, generator=generator).unbind()
    for group in range(2):
        expected = diversity.cover(rows[group].tolist(), 18, factor[group].tolist(), offset[group].tolist())
        assert cover(rows, 18, factor, offset)[group].tolist() == expected
        assert greedy._cover_dense(rows, 18, factor, offset)[group].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_distances_and_determinants_choose_as_loops_do(seed):
    x = features(groups=2, width=24, seed=seed)
    for group in range(2):
        assert by_distance(x, 12)[group].tolist() == diversity.divprune(x[group], 12)
        assert by_determinant(x, 12)[group].tolist() == diversity.cdpruner(x[group], [1.0] * 20, 12)
        weight = torch.rand(20, generator=torch.Generator().manual_seed(seed))
        kernel = weight[:, None] * cosine(x)[group] * weight
        assert spanning(kernel[None], 12)[0].tolist() == diversity.cdpruner(x[group], weight.tolist(), 12)


def test_large_matrices_are_mirrored(monkeypatch):
    x = features(groups=2, size=25)
    whole = cosine(x)
    monkeypatch.setattr(greedy, "BLOCK", 4)
    # Another order of summation over 8 dimensions.
    torch.testing.assert_close(cosine(x), whole, atol=1e-6, rtol=0)
    assert torch.equal(cosine(x), cosine(x).transpose(1, 2))


def test_inputs_may_carry_gradients_and_half_precision():
    x = features().requires_grad_()
    expected = [choose(x.detach(), 5) for choose in CHOICES]
    assert all(torch.equal(choose(x, 5), index) for choose, index in zip(CHOICES, expected, strict=True))
    half = x.detach().half()
    assert torch.equal(cosine(half), cosine(half.float()))
