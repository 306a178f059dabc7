"""PyramidDrop against full attention matrices of the layers it cuts before, one token at a time."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.pyramiddrop import PyramidDrop
from lmmhooks.methods.reduction.staging import scaled_layers
from tests.engines.reducers import MROPE
from tests.methods.cuts import KWARGS, SEVERAL, equals_rendering, kept, same_bits
from tests.reference.decoder_cuts import pyramiddrop
from tests.zoo import build

RATIOS = {1: 0.75, 2: 0.5, 3: 0.25}


@pytest.mark.parametrize("positions", ["auto", "keep"])
@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, positions):
    def cuts(zoo, inputs, row, images):
        return pyramiddrop(zoo.model, [n for image in images for n in image], RATIOS)

    method = PyramidDrop(layers=(1, 2, 3), ratios=tuple(RATIOS.values()), positions=positions)
    renumber = positions == "auto" and family not in MROPE
    equals_rendering(family, method, cuts, renumber=renumber)


def test_counts_are_the_released_ones_and_sets_are_nested():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    sets = kept(zoo, inputs, PyramidDrop())
    visual = set((inputs["input_ids"][0] == zoo.model.config.image_token_id).nonzero().flatten().tolist())
    assert [len(found & visual) for found in sets] == [16, 8, 4, 2]
    assert sets[3] < sets[2] < sets[1] < sets[0]
    assert all(found >= sets[0] - visual for found in sets), "text never leaves"
    assert [PyramidDrop().count(ratio, 576) for ratio in (0.5, 0.25, 0.125)] == [288, 144, 72]
    assert PyramidDrop().count(0.29, 100) == 28, "int(V * ratio), binary fractions and all"


def test_every_layer_counts_positions_by_its_own_cache():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    layers = zoo.model.model.language_model.layers
    seen = {number: [] for number in range(4)}
    with lmmhooks.wrap(zoo.model, PyramidDrop()):
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, n=n: seen[n].append(kwargs["position_ids"][0].tolist()), with_kwargs=True
            )
            for n, layer in enumerate(layers)
        ]
        out = zoo.model.generate(**inputs, **KWARGS)
        for hook in hooks:
            hook.remove()
    prompt = inputs["input_ids"].shape[1]
    for number, dropped in enumerate((0, 8, 12, 14)):
        length = prompt - dropped
        assert seen[number] == [list(range(length)), [length], [length + 1]]
        assert out.past_key_values.layers[number].get_seq_length() == length + 2


def test_published_layers_are_quarters_of_the_depth():
    assert scaled_layers((8, 16, 24), 28) == (7, 14, 21)
    assert scaled_layers((8, 16, 24), 40) == (10, 20, 30)
    family = resolve(build("llava").model)
    assert [cut.layer for cut in PyramidDrop().cuts(family)] == [1, 2, 3]


def test_ratios_of_one_change_nothing():
    same_bits("llava", PyramidDrop(ratios=(1.0, 1.0, 1.0)))
    same_bits("llava", PyramidDrop(layers=(4,), ratios=(0.5,)))


@pytest.mark.parametrize("unit", ["average", "kept"])
def test_a_budget_is_met_by_one_ratio_for_all_cuts(unit):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, PyramidDrop(budget=0.5, budget_unit=unit)) as patch:
        zoo.model(**inputs)
        counts = [layer.visual_kept[0] for layer in patch.stats.layers]
    reached = sum(counts) / 4 if unit == "average" else counts[-1]
    # Three cuts of whole tokens: at most one token each below what is allowed.
    assert 8 - 3 < reached <= 8
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("beside", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)", "fastervlm(keep=8)"])
def test_it_composes(beside):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, "pyramiddrop", beside) as patch:
        together = torch.stack(zoo.model.generate(**inputs, **KWARGS).logits)
        # Beside fastervlm, ratios are of what it left.
        assert patch.stats.layers[3].visual_kept[:2] == ((2, 1) if "fastervlm" in beside else (4, 2))
    with lmmhooks.wrap(zoo.model, "pyramiddrop"):
        alone = torch.stack(zoo.model.generate(**inputs, **KWARGS).logits)
    assert torch.isfinite(together).all()
    assert (together - alone).abs().max() > 1e-4


def test_state_of_a_prompt_does_not_reach_the_next():
    zoo = build("qwen3_vl")
    first, second = zoo.inputs(batch=2, seed=1), zoo.inputs(batch=1, seed=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "pyramiddrop"):
        alone = zoo.model(**second).logits
        zoo.model(**first)
        assert torch.equal(zoo.model(**second).logits, alone)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"layers": (0, 2, 3)}, "layers"),
        ({"layers": (2, 1, 3)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"ratios": (0.5, 0.25)}, "ratios"),
        ({"ratios": (0.5, 0.6, 0.1)}, "ratios"),
        ({"ratios": (1.5, 0.6, 0.1)}, "ratios"),
        ({"keep": 4}, "keep"),
        ({"budget": 0.0}, "budget"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("pyramiddrop", **settings)


def test_a_budget_that_the_first_layers_exceed_is_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match=r"cannot be met by cuts from layer 1"):
        lmmhooks.wrap(build("llava").model, PyramidDrop(budget=0.1))
