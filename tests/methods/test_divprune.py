"""DivPrune against loops over distances."""

from __future__ import annotations

import pytest

import lmmhooks
from tests.methods.choosing import FAMILIES, compare, plain
from tests.reference import diversity


@pytest.mark.parametrize("order", ["raster", "selection"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, order):
    def naive(group):
        if len(group.numbers) <= 5:
            return plain(range(len(group.numbers)))
        return plain(diversity.divprune(group.states, 5), ascending=order == "raster")

    method = lmmhooks.method("divprune", keep=5, order=order)
    # Newline tokens compete with the others.
    compare(family, method, naive, by_crop=False, with_newlines=True, images=(1, 1))


def test_newline_tokens_may_be_left_out():
    def naive(group):
        return plain(diversity.divprune(group.states, 6))

    compare("llava_next", lmmhooks.method("divprune", keep=6, newline="drop"), naive, by_crop=False)


def test_shares_round_to_the_nearest_token():
    method = lmmhooks.method("divprune")
    assert method.keep == 0.098
    assert [method.count(0.098, n) for n in (576, 2880, 5, 1)] == [56, 282, 1, 1]


@pytest.mark.parametrize("settings", [{"keep": 1.5}, {"order": "random"}, {"newline": "no"}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("divprune", **settings)
