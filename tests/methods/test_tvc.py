"""TVC against sequences that are written down in full and read at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.fastv import FastV
from lmmhooks.methods.reduction.tvc import TVC, adaptive_cells, window_cells
from lmmhooks.vision import ImageTokens
from tests.engines.pressers import TOLERANCE, ByValueNorm, generate
from tests.reference.injection import injected_logits
from tests.zoo import build

BRIDGE = (20, 21, 22)
EVERY_TWO = TVC(trigger="every", every=2, bridge=BRIDGE, pooling=2)
SIX = {"max_new_tokens": 6, "min_new_tokens": 6}


class Words:
    """A tokenizer whose tokens are words such as ``w17``."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


PROCESSOR = SimpleNamespace(tokenizer=Words())


@pytest.mark.parametrize("pooling", [2, 3])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_equals_reading_the_whole_sequence_at_once(family, pooling):
    """Two rows with different numbers of images: what is inserted differs in length, and positions drift apart."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = TVC(trigger="every", every=2, bridge=BRIDGE, pooling=pooling)
    _, plain, _ = generate(zoo, inputs, **SIX)
    with lmmhooks.wrap(zoo.model, method):
        answer, logits, _ = generate(zoo, inputs, **SIX)
    for row in range(2):
        one = zoo.row(inputs, row)
        expected = injected_logits(zoo.model, one, answer[row], (2, 4), BRIDGE, pooling)
        torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(logits[:, :2], plain[:, :2])
    assert (logits[:, 2] - plain[:, 2]).abs().amax(dim=-1).min() > 1e-2


def test_words_trigger_in_every_row_on_their_own():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=3, seed=1)
    plain, _, _ = generate(zoo, inputs, **SIX)
    # Row 0 after its first token, row 1 after its third; row 2 never.
    markers = (f"w{plain[0, 0]}", f"w{plain[1, 2]}")
    assert markers[0] not in [f"w{i}" for i in plain[1:, :5].flatten()]
    assert markers[1] not in [f"w{i}" for i in [*plain[1, :2], *plain[2, :5]]]
    method = TVC(trigger="marker", markers=markers, bridge="w20 w21", pooling=2, max_injections=1)
    with lmmhooks.wrap(zoo.model, method, processor=PROCESSOR):
        answer, logits, _ = generate(zoo, inputs, **SIX)
    for row, at in enumerate([(1,), (3,), ()]):
        one = zoo.row(inputs, row)
        expected = injected_logits(zoo.model, one, answer[row], at, (20, 21), 2)
        torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=0)


def test_when_it_triggers():
    fraction = TVC(fraction=0.25, expected_length=20)
    assert [n for n in range(1, 30) if fraction.due(n, None, "")] == [5]
    assert TVC(fraction=0.1, expected_length=1).due(1, None, "")
    assert [n for n in range(1, 10) if TVC(trigger="every", every=3).due(n, None, "")] == [3, 6, 9]
    marker = TVC(trigger="marker", cooldown=5)
    assert marker.due(9, None, "and so. Wait")
    assert marker.due(9, 5, "Let me check\n")
    assert not marker.due(9, 4, "Wait")
    assert not marker.due(9, None, "Wait for it")


def test_most_injections_are_counted_per_answer():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    lengths = []
    for most in (1, 2, 9):
        method = TVC(trigger="every", every=2, bridge=BRIDGE, pooling=2, max_injections=most)
        with lmmhooks.wrap(zoo.model, method):
            lengths += [generate(zoo, inputs, max_new_tokens=8, min_new_tokens=8)[2][0] for _ in range(2)]
    once = inputs["input_ids"].shape[1] + 7 + 7  # seven fed tokens; three of the bridge and 2 x 2 of the image
    assert lengths == [once, once, once + 7, once + 7, once + 14, once + 14]


@pytest.mark.parametrize("method", [TVC(max_injections=0), TVC(trigger="every", every=6, bridge=BRIDGE)], ids=str)
def test_without_an_injection_it_is_bit_identical(method):
    """None allowed; or due behind the last token, which is never read."""
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=2)
    answer, plain, lengths = generate(zoo, inputs, **SIX)
    with lmmhooks.wrap(zoo.model, method):
        found, logits, held = generate(zoo, inputs, **SIX)
    assert torch.equal(found, answer)
    assert torch.equal(logits, plain)
    assert held == lengths


def test_rows_without_an_image_get_none():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[1, 0])
    _, plain, lengths = generate(zoo, inputs, **SIX)
    with lmmhooks.wrap(zoo.model, EVERY_TWO):
        _, logits, held = generate(zoo, inputs, **SIX)
    torch.testing.assert_close(logits[1], plain[1], atol=TOLERANCE, rtol=0)
    assert (logits[0, 2] - plain[0, 2]).abs().max() > 1e-2
    assert held[0] == lengths[0] + 14
    text = zoo.inputs(batch=2, images=0)
    _, plain, _ = generate(zoo, text, **SIX)
    with lmmhooks.wrap(zoo.model, EVERY_TWO):
        assert torch.equal(generate(zoo, text, **SIX)[1], plain)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_loop_over_forward_needs_no_positions(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, EVERY_TWO):
        answer, expected, _ = generate(zoo, inputs, **SIX)
        cache = DynamicCache(config=zoo.model.config.get_text_config())
        logits = [zoo.model(**inputs, past_key_values=cache).logits[:, -1:]]
        logits += [zoo.model(input_ids=token[None, None], past_key_values=cache).logits for token in answer[0, :-1]]
    assert all(step.shape[1] == 1 for step in logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=TOLERANCE, rtol=0)


# -- together with other methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        ["var(sink_dims='any', tau=2.6, rho=0.3)"],
        ["vcd(beta=0.0)"],
        ["fastv(keep=4)"],
        ["uniform-grid(keep=4)"],
        ["uniform-grid(keep=8)", "fastv(keep=4)"],
        [ByValueNorm()],
        ["look-m(hh_ratio=0.5)"],
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_beside_other_methods_a_row_equals_itself_in_a_batch(family, others):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, *others):
        _, without, _ = generate(zoo, inputs, **SIX)
    with lmmhooks.wrap(zoo.model, *others, EVERY_TWO):
        tokens, logits, _ = generate(zoo, inputs, **SIX)
        for row in range(2):
            one, one_logits, _ = generate(zoo, zoo.row(inputs, row), **SIX)
            # Contrasting doubles what padding changes.
            torch.testing.assert_close(logits[row], one_logits[0], atol=5 * TOLERANCE, rtol=0)
            assert torch.equal(tokens[row], one[0])
    assert torch.equal(logits[:, :2], without[:, :2])
    assert (logits[:, 2] - without[:, 2]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_whole_image_is_shown_again_after_a_cut(family):
    """Tokens that are only hidden leave positions and lengths alone: the answer must be the same."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    found = []
    for mode in ("prune", "mask"):
        with lmmhooks.wrap(zoo.model, FastV(keep=4, mode=mode), EVERY_TWO):
            found.append(generate(zoo, inputs, **SIX)[1])
    torch.testing.assert_close(found[0], found[1], atol=TOLERANCE, rtol=0)


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_windows_lose_no_cell_and_adaptive_ones_share_the_side():
    side = torch.arange(7)
    assert window_cells(side, 7, 3).int().tolist() == [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0], [0] * 6 + [1]]
    features = torch.randn(1, 1, 7, generator=torch.Generator().manual_seed(0))
    for size in (2, 4, 7, 9):
        cells = adaptive_cells(side, 7, size).float()
        pooled = (cells / cells.sum(dim=1, keepdim=True)) @ features[0, 0]
        torch.testing.assert_close(pooled, torch.nn.functional.adaptive_avg_pool1d(features, size)[0, 0])


@pytest.mark.parametrize(("mode", "shape"), [("window", (6, 6)), ("adaptive", (4, 4))])
def test_a_grid_of_24_becomes(mode, shape):
    tokens = ImageTokens.raster([(24, 24)])
    pooling = TVC(mode=mode).pool(tokens)
    states = torch.randn(576, 5, generator=torch.Generator().manual_seed(0))
    image = states.T.reshape(1, 5, 24, 24)
    expected = torch.nn.functional.adaptive_avg_pool2d(image, shape)[0].flatten(1).T
    torch.testing.assert_close(pooling.weights @ states, expected)
    assert (int(pooling.row.max()) + 1, int(pooling.col.max()) + 1) == shape


def test_every_crop_is_pooled_on_what_unpadding_left_of_it():
    tokens = ImageTokens.raster([(4, 4), (4, 4)])
    left = tokens.subset((tokens.crop == 0) | (tokens.row > 0))
    pooling = TVC(pooling=3).pool(left)
    assert pooling.row.tolist() == [0, 0, 1, 1, 0, 0]
    assert pooling.col.tolist() == [0, 1, 0, 1, 0, 1]
    torch.testing.assert_close(pooling.weights.sum(dim=1), torch.ones(6))
    assert (pooling.weights[4] > 0).sum() == 9


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_text_needs_the_processor():
    zoo = build("llava")
    for method in ("tvc", TVC(trigger="marker", bridge=())):
        with pytest.raises(lmmhooks.MethodError, match="processor"):
            lmmhooks.wrap(zoo.model, method)
        assert find_runtime(zoo.model) is None


def test_an_unknown_grid_is_refused():
    with pytest.raises(lmmhooks.PromptError, match="token grid"):
        TVC().pool(ImageTokens.unknown(5))


def test_words_of_beams_are_refused():
    zoo = build("llava")
    method = TVC(trigger="marker", bridge=BRIDGE)
    with (
        lmmhooks.wrap(zoo.model, method, processor=PROCESSOR),
        pytest.raises(lmmhooks.PromptError, match="without beams"),
    ):
        zoo.model.generate(**zoo.inputs(batch=1), max_new_tokens=4, num_beams=2, do_sample=False)


def test_branches_on_demand_are_refused():
    with pytest.raises(lmmhooks.MethodError, match="lazy=False"):
        lmmhooks.wrap(build("llava").model, "vcd(lazy=True)", EVERY_TWO)


def test_generate_cannot_continue_an_answer_with_images_in_it():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, text=30)
    with lmmhooks.wrap(zoo.model, TVC(trigger="every", every=2, bridge=(), pooling=4, max_injections=1)):
        out = zoo.model.generate(**inputs, **SIX, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[20, 21, 22]])], dim=1)
        with pytest.raises(lmmhooks.PromptError, match="earlier cache"):
            zoo.model.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"bridge": 3},
        {"max_injections": -1},
        {"trigger": "never"},
        {"fraction": 0.0},
        {"expected_length": 0},
        {"every": 0},
        {"markers": ()},
        {"cooldown": -1},
        {"pooling": 0},
        {"mode": "max"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("tvc", **settings)
