"""Exits of visual tokens: fixed, by two rules and by gates, against attention and states looked at row by row."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.dyvte import DyVTE
from lmmhooks.methods.tensors import TensorSet
from tests.engines.reducers import MROPE, visual_groups
from tests.methods.cuts import KWARGS, SEVERAL, TOLERANCE, equals_rendering, kept, same_bits
from tests.reference.decoder_cuts import exit_at, gated, patient
from tests.reference.reduction import reduced_logits
from tests.zoo import build


def numbers(images):
    return [n for image in images for n in image]


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("family", SEVERAL)
def test_a_fixed_exit_equals_the_naive_rendering(family, positions):
    if family in MROPE and positions == "repack":
        pytest.skip("refused by design: positions are grid coordinates")

    def cuts(zoo, inputs, row, images):
        return {2: exit_at(numbers(images))}

    equals_rendering(family, DyVTE(layer=2, positions=positions), cuts, renumber=positions == "repack")


def masses(family):
    """Attention of the last row on the image, head mean, of every layer and row of the default batch."""
    zoo = build(family, attn="eager")
    batch = zoo.inputs(batch=2, images=[1, 2])
    with torch.no_grad():
        weights = zoo.model(**batch, output_attentions=True).attentions
    visual = batch["input_ids"] == zoo.model.config.image_token_id
    return torch.stack([(layer[:, :, -1].mean(dim=1) * visual).sum(dim=1) for layer in weights])


@pytest.mark.parametrize("family", SEVERAL)
def test_the_mass_rule_equals_the_naive_rendering(family):
    # Between the rows, so that one leaves and the other, perhaps, does not.
    tau = float(masses(family)[1:3].amax(dim=0).sum()) / 2 + 0.05

    def cuts(zoo, inputs, row, images):
        visual = numbers(images)

        def holds(layer, attention, last):
            # Nothing left the sequence before: numbers are places.
            return float(attention[:, last, visual].sum(dim=-1).mean()) < tau

        return patient(visual, holds, 1, 4)

    method = DyVTE(rule="mass", tau=tau, first=1)
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[1, 2])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
        zoo.model(**inputs)
        assert 0 in patch.stats.layers[3].visual_kept, "a threshold at which nobody leaves proves nothing"
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(**inputs, **KWARGS)
    assert torch.isfinite(torch.stack(out.logits)).all()
    for row in range(2):
        alone = zoo.row(inputs, row)
        eager = build(family, attn="eager")
        compare_row(zoo, eager, alone, method, cuts)


def compare_row(zoo, eager, inputs, method, cuts):
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        prefill = zoo.model(**inputs).logits
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(**inputs, **KWARGS)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    images = visual_groups(eager.model, inputs, 0)

    def rendered():
        return {layer: (choose, False) for layer, choose in cuts(eager, inputs, 0, images).items()}

    torch.testing.assert_close(prefill[0], reduced_logits(eager.model, inputs, 0, rendered()), atol=TOLERANCE, rtol=0)
    steps = reduced_logits(eager.model, inputs, 0, rendered(), answer[:, :-1])[-3:]
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0], steps, atol=TOLERANCE, rtol=0)


def drifts(zoo, inputs, row, visual):
    """By layer, relative change of the last prompt row's head outputs when visual keys are left out."""
    with torch.no_grad():
        out = zoo.model(**zoo.row(inputs, row), use_cache=True, output_attentions=True)
    found = []
    for layer, weights in zip(out.past_key_values.layers, out.attentions, strict=True):
        values, changes = layer.values[0], []
        for head, weight in enumerate(weights[0][:, -1]):
            value = values[head * len(values) // weights.shape[1]]
            full = sum(w * v for w, v in zip(weight, value, strict=True))
            text = [n for n in range(len(weight)) if n not in visual]
            part = sum(weight[n] * value[n] for n in text) / sum(weight[n] for n in text)
            changes.append(float((full - part).norm() / full.norm()))
        found.append(sum(changes) / len(changes))
    return found


@pytest.mark.parametrize("family", SEVERAL)
def test_the_drift_rule_equals_the_naive_rendering(family):
    zoo = build(family, attn="eager")
    inputs = zoo.inputs(batch=2, images=[1, 2])
    found = [drifts(zoo, inputs, row, numbers(visual_groups(zoo.model, inputs, row))) for row in range(2)]
    eps = max(max(row[1:3]) for row in found) + 1e-3

    def cuts(zoo, inputs, row, images):
        visual = numbers(images)
        values = drifts(zoo, inputs, row, visual)
        return patient(visual, lambda layer, attention, last: values[layer] < eps, 1, 4)

    equals_rendering(family, DyVTE(rule="drift", eps=eps, first=1), cuts)


def test_drift_is_what_the_engine_reads():
    zoo, eager = build("qwen3_vl"), build("qwen3_vl", attn="eager")
    inputs = zoo.inputs(batch=2, images=[1, 2])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, DyVTE(rule="drift", eps=0.0, first=1)):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    read = {k: v[1] for m in state._memory.values() for k, v in m.items() if str(k).endswith("drift]")}
    for row in range(2):
        expected = drifts(eager, inputs, row, numbers(visual_groups(eager.model, inputs, row)))
        for layer in (1, 2):
            assert float(read[f"decoder_rows[{layer}, last, drift]"][row, -1]) == pytest.approx(
                expected[layer], abs=1e-5
            )


def test_thresholds_of_zero_and_infinity_never_and_at_once():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    for rule, name in (("mass", "tau"), ("drift", "eps")):
        same_bits("llava", DyVTE(rule=rule, **{name: 0.0}))
        with torch.no_grad(), lmmhooks.wrap(zoo.model, DyVTE(rule=rule, first=1, **{name: math.inf})) as patch:
            zoo.model(**inputs)
            assert [sum(layer.visual_kept) for layer in patch.stats.layers] == [48, 48, 0, 0]


# -- gates ------------------------------------------------------------------------------------------------------------


def random_gates(zoo, seed):
    generator = torch.Generator().manual_seed(seed)
    width = zoo.model.config.text_config.hidden_size
    draw = lambda *shape: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    return {layer: (draw(24, 2 * width), draw(2, 24)) for layer in range(4)}


def as_set(gates):
    return TensorSet(
        {f"{layer}.{name}": w for layer, pair in gates.items() for name, w in zip(("w1", "w2"), pair, strict=True)}
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", SEVERAL)
def test_gates_equal_the_naive_rendering(family, seed):
    zoo = build(family)
    gates = random_gates(zoo, seed)
    # The last gate that is asked always says leave, so that something happens.
    gates[2] = (gates[2][0].abs(), torch.stack([-gates[2][1][0].abs(), gates[2][1][1].abs()]))
    first = max(1, resolve(zoo.model).deepstack_layers)
    asked = {layer: pair for layer, pair in gates.items() if first - 1 <= layer < 3}
    method = DyVTE(rule="gate", gates=as_set(gates))
    inputs = zoo.inputs(batch=2, images=[1, 2])
    for row in range(2):
        compare_row(
            zoo,
            build(family, attn="eager"),
            zoo.row(inputs, row),
            method,
            lambda z, i, r, images: gated(numbers(images), asked),
        )
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
        zoo.model(**inputs)
        together = [layer.visual_kept for layer in patch.stats.layers]
    for row in range(2):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
            zoo.model(**zoo.row(inputs, row))
            assert [layer.visual_kept[0] for layer in patch.stats.layers] == [counts[row] for counts in together]


def test_a_gate_that_always_fires_and_one_that_never_does():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    width = zoo.model.config.text_config.hidden_size
    inner = torch.zeros(2, 2 * width)
    # GELU of a pair of opposite numbers adds up to something positive, whatever the features are.
    inner[0, :width], inner[1, :width] = 1.0, -1.0
    for outer, expected in (([[0.0, 0.0], [1.0, 1.0]], [16, 0, 0, 0]), ([[1.0, 1.0], [0.0, 0.0]], [16] * 4)):
        gates = as_set({layer: (inner, torch.tensor(outer)) for layer in range(4)})
        with torch.no_grad(), lmmhooks.wrap(zoo.model, DyVTE(rule="gate", gates=gates)) as patch:
            zoo.model(**inputs)
            assert [layer.visual_kept[0] for layer in patch.stats.layers] == expected


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_gates_are_read_from_a_file_by_their_official_names(tmp_path, suffix):
    zoo = build("llava")
    gates = random_gates(zoo, 0)
    names = {
        f"model.visual_gates_router.{layer}.{name}.weight": w
        for layer, pair in gates.items()
        for name, w in zip(("w1", "w2"), pair, strict=True)
    }
    file = tmp_path / f"gates{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({**names, "model.norm.weight": torch.ones(3)}, file)
    with lmmhooks.wrap(zoo.model, DyVTE(rule="gate", gate_path=str(file))) as patch:
        (method,) = patch.methods
        assert method.gates == as_set(gates)
        assert method.settings()["gate_path"] is None, (
            "what gates say counts in the identity of an answer, not where they lie"
        )


def test_gates_that_do_not_fit_are_refused(tmp_path):
    zoo = build("llava")
    with pytest.raises(lmmhooks.MethodError, match=r"gate_path .* cannot be read"):
        lmmhooks.wrap(zoo.model, DyVTE(rule="gate", gate_path=str(tmp_path / "none.safetensors")))
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(lmmhooks.MethodError, match="holds no weights called visual_gates_router"):
        lmmhooks.wrap(zoo.model, DyVTE(rule="gate", gate_path=str(tmp_path / "other.safetensors")))
    gates = random_gates(zoo, 0)
    del gates[2]
    with pytest.raises(lmmhooks.MethodError, match="gates of layer 2 do not fit llava"):
        lmmhooks.wrap(zoo.model, DyVTE(rule="gate", gates=as_set(gates)))
    (tmp_path / "broken.pt").write_bytes(b"no archive")
    with pytest.raises(lmmhooks.MethodError, match="cannot be read"):
        lmmhooks.wrap(zoo.model, DyVTE(rule="gate", gate_path=str(tmp_path / "broken.pt")))


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_an_exit_past_the_last_layer_does_nothing():
    same_bits("llava", DyVTE(layer=4))


def test_an_exit_before_the_decoder_is_the_prompt_without_the_image_at_its_old_positions():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    ids = inputs["input_ids"]
    text = ids[0] != zoo.model.config.image_token_id
    with torch.no_grad():
        short = zoo.model.model.language_model(
            inputs_embeds=zoo.model.get_input_embeddings()(ids[:, text]),
            position_ids=torch.arange(ids.shape[1])[None, text],
            attention_mask=torch.ones(1, int(text.sum()), dtype=torch.long),
        ).last_hidden_state
        with lmmhooks.wrap(zoo.model, DyVTE(layer=0)):
            logits = zoo.model(**inputs).logits
        torch.testing.assert_close(logits[:, text], zoo.model.lm_head(short), atol=TOLERANCE, rtol=0)


def test_lengths_of_caches():
    zoo = build("llava_next")
    inputs = zoo.inputs(batch=1)
    sets = kept(zoo, inputs, "dyvte")
    span = int((inputs["input_ids"] == zoo.model.config.image_token_id).sum())
    assert [len(sets[0]) - len(found) for found in sets] == [0, 0, span, span], "newline tokens leave with the others"
    with lmmhooks.wrap(zoo.model, "dyvte"):
        out = zoo.model.generate(**inputs, **KWARGS)
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [len(found) + 2 for found in sets]


def test_it_follows_fastv():
    zoo = build("llava")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "fastv(layer=1)", "dyvte(layer=3)") as patch:
        zoo.model(**zoo.inputs(batch=1))
        assert [layer.visual_kept[0] for layer in patch.stats.layers] == [16, 8, 8, 0]


def test_half_the_depth_is_the_published_default():
    layers = {depth: DyVTE().cuts(type("Shape", (), {"num_layers": depth})())[0].layer for depth in (32, 40, 28)}
    assert layers == {32: 16, 40: 20, 28: 14}


def test_features_that_enter_again_must_have_entered():
    with pytest.raises(lmmhooks.MethodError, match="cannot leave before layer 1; use 2 or more"):
        lmmhooks.wrap(build("qwen3_vl").model, DyVTE(layer=1))


def test_a_layer_that_has_to_be_searched_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    with pytest.raises(lmmhooks.MethodError, match="lmmhooks calibrate dyvte"):
        lmmhooks.wrap(build("llava").model, DyVTE(layer=None))


def test_prompts_without_image_stay_untouched():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[0, 1])
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        for method in ("dyvte", DyVTE(rule="mass", tau=9.0, first=1)):
            with lmmhooks.wrap(zoo.model, method):
                logits = zoo.model(**inputs).logits
            valid = inputs["attention_mask"][0].bool()
            torch.testing.assert_close(logits[0, valid], plain[0, valid], atol=TOLERANCE, rtol=0)
            assert (logits[1, -1] - plain[1, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["fixed", "mass"])
@pytest.mark.parametrize("beside", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)"])
def test_it_composes(rule, beside):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    # So late that the other method has acted on an image before.
    own = DyVTE(layer=3) if rule == "fixed" else DyVTE(rule=rule, tau=9.0)
    logits = []
    for methods in ([own, beside], [own]):
        with lmmhooks.wrap(zoo.model, *methods):
            logits.append(torch.stack(zoo.model.generate(**inputs, **KWARGS).logits))
    assert torch.isfinite(logits[0]).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rule": "learned"}, "rule"),
        ({"rule": "gate"}, "rule"),
        ({"gate_path": "x.pt"}, "rule"),
        ({"layer": -1}, "layer"),
        ({"layer": "middle"}, "layer"),
        ({"rule": "mass", "layer": None}, "layer"),
        ({"rule": "mass", "first": -1}, "first"),
        ({"tau": -1.0}, "tau"),
        ({"eps": -1.0}, "eps"),
        ({"keep": 4}, "keep"),
        ({"budget": 0.5}, "budget"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("dyvte", **settings)
