"""Imbalanced-attention fix against groups made from full attention matrices of the tower, and a dense boost."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.errors import MethodError
from lmmhooks.family import resolve
from lmmhooks.methods.attention.fix_imbalance import FixImbalance, salient_groups
from lmmhooks.methods.attention.pai import Pai
from lmmhooks.methods.decoding.pai_guidance import PaiGuidance
from tests.methods.boosts import generated, naive_logits, spy_on_strengths
from tests.reference import boosts as naive
from tests.reference.attention import full_logits
from tests.reference.decoding import without_image
from tests.reference.reduction import tower_attention
from tests.zoo import build

# float32 through four layers in another summation order; largest difference seen is 3e-6.
TOLERANCE = 1e-5
STEPS = 3
ALPHA, BETA, RATIO = 0.9, 0.5, 0.3
#: Vision layers (local, global) of the tests: the defaults, but for the global one of Qwen2.5-VL, which would be 1 too.
LAYERS = {"llava": (0, 1), "llava_next": (0, 1), "internvl": (0, 1), "qwen2_5_vl": (1, 3), "qwen3_vl": (0, 2)}


def spans_of(zoo, inputs):
    """Visual spans of a batch; where the images are is tested with the layout."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "attention-identity"):
        zoo.model(**inputs)
        return find_runtime(zoo.model).last.layout.spans


def per_image(zoo, inputs, spans, per_call):
    """Scores per attention call and patch as scores per image and token, each family's packing spelled out."""
    lengths = [len(span) for span in spans]
    if zoo.name == "llava":
        return [row.tolist() for row in per_call[0]]
    if zoo.name == "internvl":
        # 4 x 4 patches of a tile become 2 x 2 tokens.
        tokens = per_call[0].view(-1, 2, 2, 2, 2).mean(dim=(2, 4)).flatten()
        return [part.tolist() for part in tokens.split(lengths)]
    if zoo.name == "llava_next":
        out, first = [], 0
        for span in spans:
            cells = zip(span.tokens.crop.tolist(), span.tokens.row.tolist(), span.tokens.col.tolist(), strict=True)
            out.append([float(per_call[0][first + k, 4 * r + c]) if k >= 0 else math.nan for k, r, c in cells])
            first += len(span.tokens.grids)
        return out
    # Qwen: four patches in a row are one token; the windowed tower sees the tokens window by window, 2 x 2 in each.
    tokens = torch.cat([patches.flatten() for patches in per_call]).view(-1, 4).mean(dim=1)
    out = [part.tolist() for part in tokens.split(lengths)]
    if zoo.name == "qwen2_5_vl":
        for image, (_, height, width) in enumerate(inputs["image_grid_thw"].tolist()):
            rows, cols = height // 2, width // 2
            cells = [(r, c) for r in range(rows) for c in range(cols)]
            by_window = sorted(cells, key=lambda cell: (cell[0] // 2, cell[1] // 2, cell))
            score_of = dict(zip(by_window, out[image], strict=True))
            out[image] = [score_of[cell] for cell in cells]
    return out


def naive_strengths(zoo, inputs):
    """Per row of the batch, position to strength; and whether both groups were found in some image."""
    family, spans = resolve(zoo.model), spans_of(zoo, inputs)
    seen = {}
    with torch.no_grad(), tower_attention(zoo.model, seen):
        zoo.model(**inputs)
    readings = []
    for layer in LAYERS[zoo.name]:
        means = [weights.sum(dim=1) for weights in seen[layer]]
        salient = [mean[:, 0, 1:] if family.has_cls else mean.sum(dim=1) for mean in means]
        readings.append(per_image(zoo, inputs, spans, salient))
    strengths = [{} for _ in inputs["input_ids"]]
    both = False
    for span, first, late in zip(spans, *readings, strict=True):
        local, outliers = naive.salient_groups(first, late, RATIO)
        both |= bool(local) and bool(outliers)
        place = span.positions.tolist()
        strengths[span.sample].update({place[v]: ALPHA for v in local})
        strengths[span.sample].update({place[v]: BETA for v in outliers})
    return strengths, both


def settings_of(zoo):
    late = LAYERS[zoo.name][1] if zoo.name == "qwen2_5_vl" else None
    return {"alpha": ALPHA, "beta": BETA, "local_ratio": RATIO, "start": 0, "global_layer": late}


@pytest.mark.parametrize("family", LAYERS)
def test_boost_equals_the_naive_rendering_at_prefill_and_decode(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1], seed=5)
    strengths, both = naive_strengths(zoo, inputs)
    assert both, "inputs in which one group is empty everywhere prove nothing"
    with lmmhooks.wrap(zoo.model, FixImbalance(gamma=1.0, **settings_of(zoo))):
        answer, logits = generated(zoo, inputs, STEPS)
    edit = naive.boosted(strengths, inputs["input_ids"].shape[1], range(4))
    expected = naive_logits(zoo, inputs, edit, answer)
    plain = naive_logits(zoo, inputs, None, answer)
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-2, "a boost that changes no step proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("compat", ["paper", "release"])
def test_with_guidance(compat, lazy):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, seed=1)
    strengths, _ = naive_strengths(zoo, inputs)
    method = FixImbalance(gamma=1.5, plausibility=0.02, lazy=lazy, compat=compat, **settings_of(zoo))
    with lmmhooks.wrap(zoo.model, method):
        answer, logits = generated(zoo, inputs, STEPS)
    prompt = inputs["input_ids"].shape[1]
    edit = naive.boosted(strengths, prompt, range(4), prompt if compat == "release" else None)
    main = naive_logits(zoo, inputs, edit, answer)
    text = full_logits(zoo.model, without_image(inputs, resolve(zoo.model).visual_ids), answer[:, :-1])[:, -STEPS:]
    for row in range(2):
        for step in range(STEPS):
            expected = naive.guided(main[row, step], text[row, step], 1.5, 0.02)
            # Weights 1.5 and -0.5 double errors; largest seen: 6e-6.
            torch.testing.assert_close(logits[row, step].log_softmax(-1), expected, atol=2 * TOLERANCE, rtol=0)


def test_groups_equal_the_naive_ones_and_are_disjoint():
    generator = torch.Generator().manual_seed(0)
    found = set()
    for length in (5, 16, 50, 576):
        first, late = torch.rand(length, generator=generator), torch.rand(length, generator=generator) ** 6
        first[2] = late[2] = torch.nan
        for ratio in (0.0, 0.1, 0.25, 1.0):
            local, outliers = salient_groups(first, late, ratio)
            expected = naive.salient_groups(first.tolist(), late.tolist(), ratio)
            assert (set(local.nonzero().flatten().tolist()), set(outliers.nonzero().flatten().tolist())) == expected
            assert not (local & outliers).any()
            assert local.sum() <= math.floor((length - 1) * ratio)
            assert not (local | outliers)[2], "a token of no place in the image"
            found.add((bool(local.any()), bool(outliers.any())))
    assert (True, True) in found


def test_without_outliers_the_global_group_is_empty():
    local, outliers = salient_groups(torch.arange(8.0), torch.arange(8.0), 0.25)
    assert local.tolist() == [False] * 6 + [True] * 2
    assert not outliers.any()


def test_tokens_of_an_unknown_place_are_in_no_group():
    nothing = torch.full((4,), torch.nan)
    local, outliers = salient_groups(nothing, nothing, 1.0)
    assert not (local | outliers).any()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_equal_strengths_of_all_tokens_are_pai(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    answers = []
    for method in (FixImbalance(alpha=0.6, beta=0.6, local_ratio=1.0, gamma=1.3), Pai(alpha=0.6, gamma=1.3)):
        with lmmhooks.wrap(zoo.model, method):
            answers.append(generated(zoo, inputs, STEPS)[1])
    assert torch.equal(*answers)


@pytest.mark.parametrize("reducer", ["fastervlm(keep=5)", "random(keep=4)", "fastv(keep=6)"])
def test_after_a_reduction_the_strengths_stay_with_their_tokens(reducer, monkeypatch):
    """Groups are those of the whole image; what is left of them is boosted where it went."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1], seed=1)
    strengths, _ = naive_strengths(zoo, inputs)
    seen = spy_on_strengths(monkeypatch)
    settings = {**settings_of(zoo), "start": 3}
    with lmmhooks.wrap(zoo.model, reducer, FixImbalance(gamma=1.0, **settings)) as patch:
        generated(zoo, inputs, STEPS)
        index = patch._runtime.last_state.stages[-1].index.tolist()
    expected = torch.tensor([[strengths[row].get(j, 0.0) for j in kept] for row, kept in enumerate(index)])
    assert expected.any()
    assert len(index[0]) < inputs["input_ids"].shape[1]
    assert len(seen) == STEPS
    for step, strength in enumerate(seen):
        torch.testing.assert_close(strength[:, : expected.shape[1]], expected)
        assert strength.shape[1] == expected.shape[1] + step
        assert not strength[:, expected.shape[1] :].any()


def test_rows_without_image_have_no_groups(monkeypatch):
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=3, images=[1, 0, 2])
    seen = spy_on_strengths(monkeypatch)
    with lmmhooks.wrap(zoo.model, FixImbalance(gamma=1.5, start=0)):
        generated(zoo, inputs, STEPS)
    assert len(seen) == 4 * STEPS
    for strength in seen:
        assert strength.any(dim=1).tolist() == [True, False, True, False, False, False]


def test_a_prompt_without_any_image_is_left_alone():
    zoo = build("llava")
    text_only = without_image(zoo.inputs(batch=2), resolve(zoo.model).visual_ids)
    _, plain = generated(zoo, text_only, STEPS)
    with lmmhooks.wrap(zoo.model, FixImbalance(gamma=1.0)):
        _, patched = generated(zoo, text_only, STEPS)
    torch.testing.assert_close(patched, plain, atol=TOLERANCE, rtol=0)


def test_beside_vcd_every_branch_has_the_groups_of_its_own_pixels(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, seed=1)
    seen = spy_on_strengths(monkeypatch)
    with lmmhooks.wrap(zoo.model, FixImbalance(gamma=1.0, **settings_of(zoo)), "vcd(beta=0.0, noise_step=999)"):
        _, logits = generated(zoo, inputs, STEPS)
    assert logits.isfinite().all()
    strengths, _ = naive_strengths(zoo, inputs)
    for row in range(2):
        found = {j: round(float(s), 4) for j, s in enumerate(seen[0][row]) if s}
        assert found == strengths[row]
    assert seen[0][2:].any(dim=1).all()
    assert not torch.equal(seen[0][:2], seen[0][2:])


def test_two_prompts_in_a_row_do_not_share_groups():
    zoo = build("llava")
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    method = FixImbalance(alpha=1.0, beta=1.0)
    with lmmhooks.wrap(zoo.model, method):
        generated(zoo, first, STEPS)
        _, after_another = generated(zoo, second, STEPS)
    with lmmhooks.wrap(zoo.model, method):
        _, fresh = generated(zoo, second, STEPS)
    assert torch.equal(after_another, fresh)


@pytest.mark.parametrize("strengths", [{"alpha": 0.0, "beta": 0.0}, {"beta": 0.0, "local_ratio": 0.0}])
def test_strength_zero_attaches_nothing_but_guidance(strengths):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, FixImbalance(gamma=1.0, **strengths)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)
    assert FixImbalance(gamma=1.2, **strengths).parts() == (PaiGuidance(gamma=1.2),)


def test_vision_layers_are_the_first_and_the_last_but_one_or_the_nearest_that_see_all():
    def layers(family, **settings):
        found = FixImbalance(**settings).probes(resolve(build(family).model))
        return [(probe.signal, probe.layer) for probe in found]

    assert layers("llava") == [("vision_cls", 0), ("vision_cls", 1)]
    assert layers("llava", local_layer=2, global_layer=0) == [("vision_cls", 2), ("vision_cls", 0)]
    assert layers("llava_onevision") == [("vision_received", 0), ("vision_received", 1)]
    # Layers 1 and 3 of four see the whole image.
    assert layers("qwen2_5_vl") == [("vision_received", 1), ("vision_received", 1)]


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llava", {"local_layer": 3}, "local_layer=3 is not in the vision tower, which has layers 0 to 2"),
        ("llava", {"global_layer": -1}, "global_layer=-1 is not in the vision tower"),
        ("qwen2_5_vl", {"local_layer": 0}, "vision layer 0 attends inside windows; layers that see all: 1, 3"),
        ("llava", {"end": 7}, "fix-imbalance: end=7"),
    ],
)
def test_layers_that_do_not_fit_are_refused_at_wrap(family, settings, reason):
    with pytest.raises(MethodError, match=reason):
        lmmhooks.wrap(build(family).model, FixImbalance(**settings))


@pytest.mark.parametrize("name", ["alpha", "beta", "local_ratio", "plausibility"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(MethodError, match=f"fix-imbalance: {name}="):
        FixImbalance(**{name: value})


def test_presets_are_what_was_released():
    cli = lmmhooks.methods.resolve("fix-imbalance(preset='released_cli')")
    assert (cli.alpha, cli.beta, cli.local_ratio, cli.gamma, cli.compat) == (0.7, 0.3, 0.25, 2.0, "release")
