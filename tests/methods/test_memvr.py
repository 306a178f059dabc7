"""MemVR against its naive rendering, and the invariants of its formulas."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.attention.memvr import Memvr, retrace, uncertainty
from tests.reference.attention import full_logits
from tests.reference.decoding import noised_inputs
from tests.reference.steering import hooked, memvr_rows, visual_embeddings
from tests.zoo import FAMILIES, build

# float32 through six layers in another summation order, means over all channels; largest difference seen is 5e-6.
TOLERANCE = 1e-5
STEPS = 4
# The entropies of the random models lie between 0.85 and 1: at this threshold rows trigger at different layers.
WINDOW = {"start": 0, "end": 5, "threshold": 0.96, "ratio": 0.3}
METHOD = Memvr(**WINDOW)


def generate(zoo, inputs):
    """New tokens and logits ``[B, steps, vocabulary]``."""
    out = zoo.model.generate(
        **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def logits_of(zoo, inputs):
    with torch.no_grad():
        return zoo.model(**inputs).logits


def naive(zoo, inputs, answer, images="last"):
    """Expected logits of prompt and answer, and where the rendering injected."""
    features = visual_embeddings(zoo, inputs, images)
    edit, read, log = memvr_rows(zoo.model, inputs["input_ids"], features, **WINDOW)
    with hooked(zoo.model, mlp=edit, read=read):
        return full_logits(zoo.model, inputs, answer), log


@pytest.mark.parametrize("images", [1, [2, 1, 1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, images):
    zoo = build(family, layers=6)
    inputs = zoo.inputs(batch=3, images=images)
    with lmmhooks.wrap(zoo.model, METHOD):
        answer, logits = generate(zoo, inputs)
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -STEPS:]
    expected, log = naive(zoo, inputs, answer[:, :-1])
    expected = expected[:, -STEPS:]
    assert len({layer for _, _, layer in log}) > 1, "rows and steps that all trigger alike prove little"
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-2, (
        "settings under which nothing is edited prove nothing"
    )
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_all_images_of_a_row_can_be_shown_again(family):
    zoo = build(family, layers=6)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, Memvr(**WINDOW, images="all")):
        answer, logits = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, METHOD):
        last_only = logits_of(zoo, inputs)[:, -1]
    expected, _ = naive(zoo, inputs, answer[:, :-1], images="all")
    torch.testing.assert_close(logits, expected[:, -STEPS:], atol=TOLERANCE, rtol=0)
    assert (logits[0, 0] - last_only[0]).abs().max() > 1e-3
    torch.testing.assert_close(logits[1, 0], last_only[1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_row_without_image_is_bit_identical(family):
    zoo = build(family, layers=6)
    inputs = zoo.inputs(batch=3, images=[1, 0, 1])
    plain = logits_of(zoo, inputs)
    with lmmhooks.wrap(zoo.model, Memvr(**WINDOW | {"threshold": 0.0})):
        edited = logits_of(zoo, inputs)
        text_only = zoo.inputs(batch=2, images=0)
        alone = logits_of(zoo, text_only)
    assert torch.equal(edited[1], plain[1])
    assert (edited[[0, 2], -1] - plain[[0, 2], -1]).abs().amax(dim=1).min() > 1e-2
    assert torch.equal(alone, logits_of(zoo, text_only))


def count_heads(zoo, inputs, method):
    """Rows the language head is asked for in every forward of three steps, beside its own output."""
    asked, forwards = [], []
    text = zoo.model.model.language_model
    with lmmhooks.wrap(zoo.model, method):
        head = zoo.model.lm_head.register_forward_hook(lambda module, args, output: asked[-1].append(args[0].shape[0]))
        start = text.layers[0].register_forward_pre_hook(lambda *_: asked.append([]))
        generate(zoo, inputs)
        head.remove()
        start.remove()
    forwards = [rows[:-1] for rows in asked]
    assert len(forwards) == STEPS
    return forwards


def test_the_head_is_asked_inside_the_window_and_no_longer_once_a_row_triggered():
    zoo = build("llava", layers=6)
    inputs = zoo.inputs(batch=2)
    assert count_heads(zoo, inputs, Memvr(**WINDOW | {"threshold": 0.0})) == [[2]] * STEPS
    # Layers 1 to 4 lie strictly between 0 and 5.
    assert count_heads(zoo, inputs, Memvr(**WINDOW | {"threshold": 0.99999})) == [[2, 2, 2, 2]] * STEPS
    some = count_heads(zoo, inputs, METHOD)
    assert any(1 in rows for rows in some), "no row triggered before the other"
    assert all(rows == sorted(rows, reverse=True) for rows in some)


def test_a_row_is_injected_at_most_once_per_forward_in_the_layer_after_its_trigger():
    zoo = build("llava", layers=6)
    inputs = zoo.inputs(batch=2)
    plain, edited = {}, {}
    for states, method in ((plain, None), (edited, Memvr(**WINDOW | {"threshold": 0.0}))):
        patch = lmmhooks.wrap(zoo.model, method) if method else None
        with hooked(zoo.model, read=states.__setitem__):
            logits_of(zoo, inputs)
        if patch:
            patch.remove()
    # Layer 1 triggers; layer 2 is the first that differs.
    assert torch.equal(plain[1], edited[1])
    assert not torch.equal(plain[2], edited[2])
    # From there on the layers are the model's own: run from the edited state, they give the edited outputs.
    handle = zoo.model.model.language_model.layers[2].register_forward_hook(lambda *_: edited[2])
    again = {}
    with hooked(zoo.model, read=again.__setitem__):
        logits_of(zoo, inputs)
    handle.remove()
    for layer in (3, 4, 5):
        assert torch.equal(again[layer], edited[layer])


def test_a_threshold_nothing_reaches_is_bit_identical():
    zoo = build("llava", layers=6)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Memvr(**WINDOW | {"threshold": 0.99999})) as patch:
        assert patch.attached
        logits = logits_of(zoo, inputs)
    assert torch.equal(logits, logits_of(zoo, inputs))


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"threshold": 1.0}])
def test_strength_zero_attaches_nothing(settings):
    zoo = build("llava")
    inputs = zoo.inputs()
    plain = logits_of(zoo, inputs)
    with lmmhooks.wrap(zoo.model, Memvr(**settings)) as patch:
        assert patch.attached == []
        assert torch.equal(logits_of(zoo, inputs), plain)


@pytest.mark.parametrize("reducer", ["fastervlm(keep=4)", "random(keep=4)", "fastv(keep=4, layer=2)"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_tokens_that_a_reducer_removed_are_shown_again(family, reducer):
    zoo = build(family, layers=6)
    inputs = zoo.inputs(batch=2)
    expected = visual_embeddings(zoo, inputs)
    with lmmhooks.wrap(zoo.model, reducer):
        reduced = logits_of(zoo, inputs)[:, -1]
    with lmmhooks.wrap(zoo.model, reducer, Memvr(**WINDOW | {"threshold": 0.9})) as patch:
        answer, logits = generate(zoo, inputs)
        kept = find_runtime(zoo.model).last_state.memory(patch.methods[-1])["visual"]
        one, one_logits = generate(zoo, zoo.row(inputs, 0))
    for row, embeddings in enumerate(expected):
        assert torch.equal(kept[row, : len(embeddings)], embeddings)
        assert not kept[row, len(embeddings) :].any()
    assert (logits[:, 0] - reduced).abs().max() > 1e-2
    assert torch.equal(answer[:1], one)
    torch.testing.assert_close(logits[:1], one_logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_branches_trigger_and_remember_by_themselves(family):
    zoo = build(family, layers=6)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, METHOD, "vcd(alpha=1.0, beta=0.0)"):
        logits = logits_of(zoo, inputs)[:, -1]
    with lmmhooks.wrap(zoo.model, METHOD):
        main, other = (logits_of(zoo, prompt)[:, -1] for prompt in (inputs, noised_inputs(zoo, inputs)))
    # The contrast triples the rounding of each.
    torch.testing.assert_close(logits, 2 * main - other, atol=3 * TOLERANCE, rtol=0)


def test_an_error_between_trigger_and_injection_leaves_nothing_for_the_next_prompt():
    zoo = build("llava", layers=6)
    inputs = zoo.inputs(batch=2)
    plain = logits_of(zoo, inputs)

    def fail(*args):
        raise RuntimeError("between the layers")

    method = Memvr(**WINDOW | {"threshold": 0.0})
    with lmmhooks.wrap(zoo.model, method):
        expected = logits_of(zoo, inputs)
        handle = zoo.model.model.language_model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="between the layers"):
            logits_of(zoo, inputs)
        handle.remove()
        assert torch.equal(logits_of(zoo, inputs), expected)
    assert torch.equal(logits_of(zoo, inputs), plain)


def test_uncertainty_is_the_normalised_entropy_of_the_ten_best():
    logits = torch.full((3, 50), -100.0)
    logits[0, :10] = 2.0  # ten equal candidates
    logits[1, 7] = 50.0  # one candidate
    logits[2, :5] = 0.0  # five of ten
    expected = torch.tensor([1.0, 0.0, torch.tensor(5.0).log() / torch.tensor(10.0).log()])
    torch.testing.assert_close(uncertainty(logits), expected, atol=1e-6, rtol=0)
    logits[0, 10:] = 1.9  # what comes after the ten best does not count
    torch.testing.assert_close(uncertainty(logits)[0], torch.tensor(1.0))
    assert float(uncertainty(torch.zeros(1, 4))) == pytest.approx(1.0)


def test_weights_of_the_projections_cancel():
    """The released form scales keys and values by the MLP's mean weights and the memory's; one is the other."""
    generator = torch.Generator().manual_seed(0)
    x, f, z = (torch.randn(1, n, 16, generator=generator) for n in (5, 5, 7))
    up, down = 0.02, 0.3
    w1, w2 = z * up / z.abs().mean(), z.transpose(1, 2) * down / z.abs().mean()
    a = (x @ w1.transpose(1, 2)) @ w2.transpose(1, 2)
    dense = 0.7 * f + 0.3 * a * f.abs().mean() / a.abs().mean()
    torch.testing.assert_close(retrace(x, f, z, torch.ones(1, 5, dtype=torch.bool), 0.3), dense)


def test_all_of_it_is_the_memory_at_the_size_of_the_output_and_padding_does_not_count():
    generator = torch.Generator().manual_seed(0)
    x, f, z = (torch.randn(2, n, 16, generator=generator) for n in (5, 5, 7))
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    out = retrace(x, f, z, valid, 1.0)
    recalled = x @ z.transpose(1, 2) @ z
    for row in range(2):
        real = valid[row]
        torch.testing.assert_close(out[row, real].abs().mean(), f[row, real].abs().mean())
        torch.testing.assert_close(
            torch.nn.functional.normalize(out[row], dim=-1), torch.nn.functional.normalize(recalled[row], dim=-1)
        )
    x[0, :2], f[0, :2] = 1e3, -1e3
    torch.testing.assert_close(retrace(x, f, z, valid, 1.0)[0, 2:], out[0, 2:])
    fillers = torch.cat([z, torch.zeros(2, 3, 16)], dim=1)
    torch.testing.assert_close(retrace(x, f, fillers, valid, 0.4), retrace(x, f, z, valid, 0.4))
    assert torch.equal(retrace(x * 0, f, z, valid, 0.4), 0.6 * f), "a memory that answers nothing adds nothing"


@pytest.mark.parametrize(("depth", "window"), [(32, (5, 16)), (40, (6, 20)), (28, (4, 14)), (4, (0, 2)), (3, (0, 2))])
def test_the_window_follows_the_depth(depth, window):
    bound = Memvr().bind(resolve(build("llava", layers=depth).model))
    assert (bound.start, bound.end) == window


def test_presets_name_the_published_settings():
    assert lmmhooks.methods.resolve("memvr(preset='long-answers')").settings()["ratio"] == 0.28
    assert lmmhooks.methods.resolve("memvr(preset='short-answers')") == Memvr()


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 1.2}, {"threshold": -0.1}, {"images": "first"}, {"end": 4}, {"start": -1, "end": 4}],
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=f"memvr: {next(iter(settings))}="):
        lmmhooks.method("memvr", **settings)


def test_a_window_without_a_layer_is_refused():
    with pytest.raises(lmmhooks.MethodError, match="end must be at least start"):
        Memvr(start=3, end=4)


def test_layers_the_model_lacks_are_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match="end must be at least 2 and below 4"):
        lmmhooks.wrap(build("llava").model, Memvr(start=1, end=4))
