"""The numbers of a comparison, against values worked out by hand or by slower means."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy

from lmmhooks.comparison.measures import bands, carve_entropy, divergence, entropy, mean_map, ranks, within_image
from lmmhooks.comparison.words import word_groups, yes_no

NAN = math.nan


def test_within_image_leaves_out_what_is_not_there() -> None:
    rows = torch.tensor([[0.1, NAN, 0.3], [0.0, 0.0, NAN]])
    within = within_image(rows)
    assert within[0].tolist() == pytest.approx([0.25, NAN, 0.75], nan_ok=True)
    assert bool(within[1].isnan().all()), "nothing falls on the image: there is no distribution"


@pytest.mark.parametrize("num", [1, 7, 576])
def test_entropy_of_even_attention_is_the_logarithm(num) -> None:
    even = torch.full((num + 2,), 1 / num)
    even[[0, -1]] = NAN
    assert float(entropy(even)) == pytest.approx(math.log(num), abs=1e-5)


def test_entropy_of_nothing_is_nothing() -> None:
    assert math.isnan(float(entropy(torch.full((4,), NAN))))


def test_carve_averages_six_layers_of_the_last_step() -> None:
    by_layer = torch.arange(2 * 28, dtype=torch.float32).view(2, 28)
    assert carve_entropy(by_layer) == sum(range(28 + 20, 28 + 26)) / 6
    assert carve_entropy(by_layer[:, :22]) == (28 + 20 + 28 + 21) / 2, "over the layers there are"
    assert carve_entropy(by_layer[:, :20]) is None


def test_a_mean_map_counts_layers_a_token_is_absent_from_as_zero() -> None:
    within = torch.tensor([[[0.5, 0.5], [1.0, NAN]], [[0.2, 0.8], [1.0, NAN]]])
    mean = mean_map(within)
    assert mean[:, 0].tolist() == pytest.approx([0.75, 0.6])
    assert bool(mean[:, 1].isnan().all()), "removed before the last layer: no value, which is not zero"
    assert mean_map(within[:, :1]).sum(dim=1).tolist() == pytest.approx([1, 1])


def test_a_mean_map_leaves_out_layers_that_could_not_be_read() -> None:
    within = torch.tensor([[[0.5, 0.5], [NAN, NAN]]])
    assert mean_map(within)[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("layers", "most"), [(32, 16), (28, 16), (5, 16), (7, 3), (1, 4), (4, 0)])
def test_bands_hold_every_layer_once(layers, most) -> None:
    found = bands(layers, most)
    assert [layer for first, last in found for layer in range(first, last + 1)] == list(range(layers))
    assert len(found) <= max(most, 1)
    sizes = {last - first for first, last in found}
    assert max(sizes) - min(sizes) <= 1


def test_ranks_count_what_is_more_likely() -> None:
    logp = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.5, 0.0]]).log()
    assert ranks(logp, torch.tensor([1, 1])).tolist() == [2, 1]


def test_divergence_agrees_with_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 300, generator=generator).log_softmax(dim=-1)
    expected = scipy_entropy(p.double().exp().numpy(), q.double().exp().numpy(), axis=1)
    # float32 sums over 300 tokens.
    assert divergence(p, q).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert divergence(p, p).tolist() == [0] * 5


def test_divergence_is_infinite_where_something_is_ruled_out() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[1.0, 0.0, 0.0]]).log()
    assert math.isinf(float(divergence(p, q)))
    assert float(divergence(q, p)) == pytest.approx(math.log(2))


def test_tokens_join_to_words() -> None:
    texts = ["A", " tr", "icy", "cle", ",", " not", " a", " bike", ".", ""]
    assert word_groups(texts) == [[0], [1, 2, 3], [4], [5], [6], [7], [8], [9]]
    assert word_groups(["", " ...", "!"]) == [[0], [1, 2]]
    assert word_groups([]) == []


class Words:
    """A tokenizer that knows whole words only; everything else is two tokens."""

    unk_token_id = 0

    def __init__(self, **known: int) -> None:
        self.known = {name.replace("_", " "): token for name, token in known.items()}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.known[text]] if text in self.known else [98, 99]}


def test_yes_and_no_in_all_the_forms_a_tokenizer_has() -> None:
    tokenizer = Words(Yes=1, _Yes=2, no=3)
    assert yes_no(["Yes, it is."], tokenizer) == ([1, 2], [3])
    assert yes_no(["A dog.", " no"], tokenizer) == ([1, 2], [3])
    assert yes_no(["Nothing."], tokenizer) is None, "no answer is yes or no"
    assert yes_no(["Yes"], Words(Yes=1)) is None, "the tokenizer has no token for no"
