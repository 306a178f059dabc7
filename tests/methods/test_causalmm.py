"""CausalMM against passes with weighted patch features and full attention matrices, and its counterfactuals."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.causalmm import CausalMM
from lmmhooks.methods.decoding.counterfactual import counterfactual_map, patch_weights, random_numbers
from tests.methods.shown import MODES, TOLERANCE, check_logits, check_tokens, inputs_of
from tests.methods.tower_readings import images_of
from tests.reference.branch_attention import attending, counterfactual
from tests.reference.branch_features import NaiveRows, changed, contrast
from tests.zoo import build

GAMMA, BETA, SEED = 1.0, 0.02, 3
LAYERS = (1, 2)


def bilinear(grid, side):
    """One map resized by hand: the value between the four cells around the centre of every cell of the result."""
    num = len(grid)
    out = []
    for row in range(side):
        for col in range(side):
            (y0, y1, fy), (x0, x1, fx) = (
                (int(c), min(int(c) + 1, num - 1), c - int(c))
                for c in (max((i + 0.5) * num / side - 0.5, 0.0) for i in (row, col))
            )
            upper = float(grid[y0, x0]) * (1 - fx) + float(grid[y0, x1]) * fx
            lower = float(grid[y1, x0]) * (1 - fx) + float(grid[y1, x1]) * fx
            out.append(upper * (1 - fy) + lower * fy)
    return out


def edited(weights, edit):
    """Counterfactual maps ``[H, N, N]`` head by head."""
    heads, num, _ = weights.shape
    generator = torch.Generator().manual_seed(SEED)
    if edit == "random":
        return 2 * torch.rand(heads, num, num, generator=generator)
    out = []
    for head in weights:
        if edit == "uniform":
            out.append(torch.full_like(head, 1 / num))
        elif edit == "reversed":
            out.append(head.max() - head)
        else:
            out.append(head.flatten()[torch.randperm(num * num, generator=generator)].view(num, num))
    return torch.stack(out)


def patch_weight(crop, layer, edit):
    side = {16: 4}[crop.q[layer].shape[1] - crop.has_cls]
    maps = [bilinear(grid, side) for grid in edited(crop.weights(layer), edit)]
    return torch.tensor(maps).mean(dim=0)


def vision_branch(eager, inputs, edit):
    """Patches are weighted before the projector where each becomes a token, tokens behind it elsewhere."""
    family = resolve(eager.model)
    layer = {"llava": 1, "llava_next": 1, "internvl": 2, "llava_onevision": 2}.get(eager.name, 3)
    changes = []
    for row in range(2):
        crops = [crop for image in images_of(eager, inputs, row) for crop in image]

        def change(tokens, crops=crops):
            by_number = {token.number: token for token in tokens}
            for crop in crops:
                if edit == "uniform":
                    weights = torch.full((crop.q[layer].shape[1],), 1 / crop.q[layer].shape[1])
                else:
                    weights = patch_weight(crop, layer, edit)
                for number, patches in zip(crop.numbers, crop.patches, strict=True):
                    token = by_number[number]
                    if eager.name in ("llava", "llava_next"):
                        (patch,) = patches
                        token.state = family.projector(crop.output[layer][1 + patch] * weights[patch])
                    else:
                        weight = weights[patches].mean()
                        token.state = token.state * weight
                        token.deepstack = [extra * weight for extra in token.deepstack]
            return tokens

        changes.append(change)
    return changed(eager.model, inputs, changes)


def language_branch(zoo, inputs, edit, renormalize):
    drawn = {}

    def draw(layer, head, query, key):
        if layer not in drawn:
            index = torch.arange(120)[None]
            drawn[layer] = random_numbers(SEED, layer, 4, index, index)[0]
        return float(drawn[layer][head, query, key])

    edits = counterfactual(edit, set(LAYERS), inputs["input_ids"].shape[1], renormalize, draw)
    return attending(zoo.model, inputs, edits)


def method(**settings):
    return CausalMM(gamma=GAMMA, beta=BETA, seed=SEED, **settings)


def render_vision(edit):
    return lambda eager, inputs: NaiveRows(
        eager.model, inputs, [vision_branch(eager, inputs, edit)], contrast([1 + GAMMA, -GAMMA], BETA)
    )


def render_language(edit, renormalize):
    return lambda eager, inputs: NaiveRows(
        eager.model, inputs, [language_branch(eager, inputs, edit, renormalize)], contrast([1 + GAMMA, -GAMMA], BETA)
    )


def render_both(eager, inputs):
    branches = [vision_branch(eager, inputs, "shuffle"), language_branch(eager, inputs, "reverse", False)]
    return NaiveRows(eager.model, inputs, branches, contrast([1 + 2 * GAMMA, -GAMMA, -GAMMA], BETA))


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("llava", "shuffle"),
        ("llava", "random"),
        ("llava", "reversed"),
        ("llava_next", "shuffle"),
        ("internvl", "reversed"),
        ("qwen2_5_vl", "uniform"),
        ("qwen3_vl", "uniform"),
    ],
)
def test_vision_equals_separate_passes(family, edit):
    check_logits(family, method(vision=edit), render_vision(edit), seen=1e-3)


@pytest.mark.parametrize(
    ("family", "edit", "renormalize"),
    [
        ("llava", "reverse", False),
        ("llava", "reverse", True),
        ("llava", "random", False),
        ("qwen3_vl", "random", True),
        ("qwen2_5_vl", "uniform", False),
        ("internvl", "uniform", True),
        ("llava_next", "reverse", False),
    ],
)
def test_language_equals_full_matrices(family, edit, renormalize):
    settings = {"vision": None, "language": edit, "layers": LAYERS, "renormalize": renormalize}
    check_logits(family, method(**settings), render_language(edit, renormalize))


@pytest.mark.parametrize("mode", MODES)
def test_generates_the_tokens_of_the_naive_rendering(mode):
    check_tokens("llava", method(language="reverse", layers=LAYERS), render_both, mode)


def test_released_code_contrasts_the_first_token_alone():
    zoo = build("llava")
    inputs = inputs_of(zoo)
    arguments = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with lmmhooks.wrap(zoo.model, CausalMM(beta=0.0, first_token_only=True)):
        released = zoo.model.generate(**inputs, **arguments)
    with lmmhooks.wrap(zoo.model, CausalMM(beta=0.0)):
        intended = zoo.model.generate(**inputs, **arguments)
    assert torch.equal(released.logits[0], intended.logits[0])
    full = {**inputs, "input_ids": released.sequences[:, :-1]}
    full["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    plain = zoo.model(**full).logits
    torch.testing.assert_close(released.logits[2], plain[:, -1], atol=TOLERANCE, rtol=0)


def test_maps():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 17, 17, generator=generator).softmax(-1)
    shuffled = counterfactual_map(weights, "shuffle", 0)
    assert torch.equal(shuffled.flatten(2).sort(-1).values, weights.flatten(2).sort(-1).values)
    assert not torch.equal(shuffled, weights)
    index = torch.arange(17 * 17.0).view(1, 1, 17, 17).expand(2, 3, -1, -1)
    moved = counterfactual_map(index, "shuffle", 0)
    assert torch.equal(moved[0], moved[1]), "all crops get one permutation"
    assert not torch.equal(moved[0, 0], moved[0, 1]), "heads get their own"
    assert float(counterfactual_map(weights, "reversed", 0).amin()) == 0
    uniform = counterfactual_map(weights, "uniform", 0)
    assert bool((uniform == torch.tensor(1 / 17)).all())
    # Interpolating a constant: rounding of four products.
    torch.testing.assert_close(patch_weights(uniform, 4), torch.full((2, 16), 1 / 17), atol=1e-8, rtol=0)
    drawn = counterfactual_map(weights, "random", 0)
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 2


def test_random_numbers_depend_on_their_place_alone():
    rows, keys = torch.arange(40)[None], torch.arange(50)[None]
    whole = random_numbers(1, 2, 3, rows, keys)
    shifted = random_numbers(1, 2, 3, rows[:, 7:9], keys[:, 5:])
    assert torch.equal(whole[:, :, 7:9, 5:], shifted)
    for other in (random_numbers(2, 2, 3, rows, keys), random_numbers(1, 3, 3, rows, keys)):
        assert float((whole == other).float().mean()) < 0.01
    assert 0 <= float(whole.min()) < float(whole.max()) < 1
    # 6,000 uniform numbers: the mean is known to 0.004, neighbours are uncorrelated to 0.013.
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.02)
    for one, next_one in (
        (whole[..., 1:], whole[..., :-1]),
        (whole[:, :, 1:], whole[:, :, :-1]),
        (whole[:, 1:], whole[:, :-1]),
    ):
        both = torch.stack([one.flatten(), next_one.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.06


def test_bad_settings_and_towers_without_a_map_are_refused():
    for settings in (
        {"gamma": -1},
        {"vision": "shuffled"},
        {"language": "reversed"},
        {"renormalize": True},
        {"layers": (1,)},
        {"seed": -1},
    ):
        with pytest.raises(MethodError, match=next(iter(settings))):
            CausalMM(**settings)
    with pytest.raises(MethodError, match="layers 0 to 3"):
        lmmhooks.wrap(build("llava").model, CausalMM(language="uniform", layers=(4,)))
    with pytest.raises(MethodError, match="images of any size"):
        lmmhooks.wrap(build("qwen2_5_vl").model, "causalmm")
    assert CausalMM(vision=None, beta=0.0).is_identity
    assert CausalMM(gamma=0.0, beta=0.0).is_identity
