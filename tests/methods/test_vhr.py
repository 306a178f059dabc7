"""Vision-aware head reinforcement against its naive rendering."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.methods.attention.vhr import Vhr, divergence, reinforced_heads
from tests.reference.attention import dense_attention, full_logits
from tests.reference.vhr import choose, vhr, vhr_gains
from tests.zoo import build

# float32 through five layers in another summation order; largest difference seen is 8e-6.
TOLERANCE = 1e-5
LAYERS = [1, 3, 4]
METHOD = Vhr(early_layers=(1,), num_late_layers=2)
GAIN = 2.0


def answer(zoo, inputs, method, steps=3, also=()):
    """Logits ``[B, steps, vocabulary]`` and tokens under a method."""
    with lmmhooks.wrap(zoo.model, method, *also):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(out.logits, dim=1), out.sequences[:, inputs["input_ids"].shape[1] :]


def gains_of_rows(zoo, inputs, **settings):
    rows = range(len(inputs["input_ids"]))
    return [vhr_gains(zoo.model, zoo.row(inputs, i), GAIN, LAYERS, **settings) for i in rows]


def compare(zoo, inputs, method, steps=3, **settings):
    logits, tokens = answer(zoo, inputs, method, steps)
    gains = gains_of_rows(zoo, inputs, **settings)
    plain = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -steps:]
    with dense_attention(zoo.model, output=vhr(gains)):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -steps:]
    assert (expected - plain).abs().amax(dim=-1).min() > 1e-2, "an edit that changes nothing proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    return gains


@pytest.mark.parametrize("mode", ["layerwise", "twopass"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_equals_the_naive_rendering_at_prefill_and_decode(family, mode):
    zoo = build(family, layers=5)
    method = Vhr(early_layers=(1,), num_late_layers=2, mode=mode)
    gains = compare(zoo, zoo.inputs(batch=2), method, twopass=mode == "twopass")
    for row in gains:
        assert [sum(gain == GAIN for gain in layer) for layer in row.values()] == [2, 2, 2], "half of four heads"
    assert gains[0] != gains[1], "rows must differ in their heads"


@pytest.mark.parametrize("settings", [{"scale_text": False}, {"drop_outliers": False}, {"std": "population"}])
def test_every_setting_equals_the_naive_rendering(settings):
    zoo = build("qwen2_5_vl", layers=5)
    compare(zoo, zoo.inputs(batch=2), Vhr(early_layers=(1,), num_late_layers=2, **settings), **settings)


def test_layers_are_judged_on_reinforced_inputs():
    """The two modes, and the two readings of the text, choose other heads somewhere among a few models."""
    differ = {"twopass": False, "scale_text": False}
    for seed in range(6):
        zoo = build("llava", layers=5, seed=seed)
        inputs = zoo.inputs(batch=2)
        reference = gains_of_rows(zoo, inputs)
        differ["twopass"] |= gains_of_rows(zoo, inputs, twopass=True) != reference
        differ["scale_text"] |= gains_of_rows(zoo, inputs, scale_text=False) != reference
    assert all(differ.values())


@pytest.mark.parametrize("mode", ["layerwise", "twopass"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_padding_on_either_side_and_rows_without_an_image(attn, padding, mode):
    zoo = build("llava", attn=attn, layers=5)
    inputs = zoo.inputs(batch=3, images=[1, 0, 2], padding=padding)
    valid = inputs["attention_mask"].bool()
    method = Vhr(early_layers=(1,), num_late_layers=2, mode=mode)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, method):
            logits = zoo.model(**inputs).logits
    with dense_attention(zoo.model, output=vhr(gains_of_rows(zoo, inputs, twopass=mode == "twopass"))):
        expected = full_logits(zoo.model, inputs)
    torch.testing.assert_close(logits[valid], expected[valid], atol=TOLERANCE, rtol=0)
    assert torch.equal(logits[1][valid[1]], plain[1][valid[1]]), "a row without an image is untouched"
    assert (logits[0][valid[0]] - plain[0][valid[0]]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["layerwise", "twopass"])
def test_prompts_without_images_are_bit_identical(mode):
    zoo = build("qwen3_vl", layers=5)
    ids = torch.randint(8, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = zoo.model(input_ids=ids).logits
        with lmmhooks.wrap(zoo.model, Vhr(mode=mode)):
            assert torch.equal(zoo.model(input_ids=ids).logits, plain)


def test_heads_are_decided_once_and_kept():
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=2)
    seen = []

    class Noting(Vhr):
        id = "test-noting"

        def scale_heads(self, queries, outputs, context):
            gains = super().scale_heads(queries, outputs, context)
            seen.append((context.layer, gains.clone()))
            return gains

    answer(zoo, inputs, Noting(early_layers=(1,), num_late_layers=2), steps=4)
    assert [layer for layer, _ in seen] == LAYERS * 4
    expected = gains_of_rows(zoo, inputs)
    for layer, gains in seen:
        assert gains[:, :, 0, 0].tolist() == [row[layer] for row in expected]


def test_pure_functions_equal_loops():
    generator = torch.Generator().manual_seed(0)
    for heads in (1, 2, 5, 8):
        outputs, text = (torch.randn(3, heads, 6, generator=generator) for _ in range(2))
        text[1, 0] *= 9  # fires harder without the image
        for drop in (True, False):
            for std in ("sample", "population"):
                if heads == 1 and std == "sample":
                    continue  # no deviation of one number
                chosen = reinforced_heads(divergence(outputs, text, drop, std == "sample"))
                naive = [choose(x.tolist(), y.tolist(), drop, std) for x, y in zip(outputs, text, strict=True)]
                assert [row.nonzero().flatten().tolist() for row in chosen] == naive
                assert (chosen.sum(dim=1) == heads // 2).all()
        if heads == 8:
            assert reinforced_heads(divergence(outputs, text, False, True))[1, 0]
            assert not reinforced_heads(divergence(outputs, text, True, True))[1, 0]


def test_one_head_has_no_spread_and_is_never_above_its_own_median():
    outputs, text = torch.ones(2, 1, 4), torch.zeros(2, 1, 4)
    assert not reinforced_heads(divergence(outputs, text, True, True)).any()


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"early_layers": (), "num_late_layers": 0}])
def test_strength_zero_attaches_nothing(settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Vhr(**settings)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_prompts_in_a_row_do_not_share_heads():
    zoo = build("llava", layers=5)
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, METHOD):
            zoo.model.generate(**first, max_new_tokens=3)
            after_another = zoo.model(**second).logits
        with lmmhooks.wrap(zoo.model, METHOD):
            fresh = zoo.model(**second).logits
    assert torch.equal(after_another, fresh)


@pytest.mark.parametrize("mode", ["layerwise", "twopass"])
@pytest.mark.parametrize("also", ["fastervlm(keep=4)", "random(keep=4)", "fastv(keep=4)", "vcd(beta=0.0)"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_composes_with_reducers_and_branches(family, also, mode):
    """The edit shows, and a row of a padded batch gets the answer it gets alone."""
    zoo = build(family, layers=5)
    inputs = zoo.inputs(batch=2)
    method = Vhr(early_layers=(1,), num_late_layers=2, mode=mode)
    logits, tokens = answer(zoo, inputs, method, also=[also])
    without, _ = answer(zoo, inputs, Vhr(alpha=1.0), also=[also])
    assert (logits[:, 0] - without[:, 0]).abs().max() > 1e-2
    for i in range(2):
        alone, alone_tokens = answer(zoo, zoo.row(inputs, i), method, also=[also])
        torch.testing.assert_close(logits[i : i + 1], alone, atol=5 * TOLERANCE, rtol=0)
        assert torch.equal(tokens[i : i + 1], alone_tokens)


def test_layers_follow_the_depth():
    def layers(depth, **settings):
        zoo = build("llava", layers=depth)
        with lmmhooks.wrap(zoo.model, Vhr(**settings)) as patch:
            return patch.methods[0].layers(patch.family)

    assert layers(32) == [1, *range(18, 32)], "the paper's layers"
    assert layers(4) == [1, 2, 3]
    assert layers(8, early_layers=()) == [4, 5, 6, 7]
    assert lmmhooks.methods.resolve("vhr(preset='late')").early_layers == ()


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"num_late_layers": -1}, {"mode": "once"}, {"std": "robust"}])
def test_values_out_of_range_are_refused_by_name(settings):
    name = next(iter(settings))
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("vhr", **settings)


@pytest.mark.parametrize("settings", [{"early_layers": (4,)}, {"num_late_layers": 5}])
def test_layers_outside_the_model_are_refused_at_wrap(settings):
    name = next(iter(settings))
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.wrap(build("llava").model, Vhr(**settings))
