"""The benchmark's own instruments: order of rounds, ratios, live bytes, spans; and one measurement end to end."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import lmmhooks
from lmmhooks.bench.branching import naive_loop, read_branches, suffix_pass
from lmmhooks.bench.measure import measure_disabled, measure_variant
from lmmhooks.bench.memory import peak_bytes
from lmmhooks.bench.passes import timed_pass
from lmmhooks.bench.prompts import make_prompt
from lmmhooks.bench.shapes import build_model
from lmmhooks.bench.timing import interleave, paired_ratio, spread
from lmmhooks.family import resolve

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return build_model("test-shape")


@pytest.fixture(scope="module")
def prompt(model):
    return make_prompt(model, batch=2, text=16)


def test_rounds_alternate_and_drop_the_warmup() -> None:
    calls: list[str] = []

    def action(name: str):
        def run() -> int:
            calls.append(name)
            return len(calls)

        return run

    results = interleave({name: action(name) for name in "abc"}, repeat=2, warmup=1)
    assert "".join(calls) == "abcbcacab"
    assert results == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}


def test_ratios_are_taken_within_rounds() -> None:
    # A machine that gets ten times slower half way: the ratio of medians would say 1.1, the rounds say 2.
    slow, fast = [2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]
    assert paired_ratio(slow, fast) == spread([2.0] * 4)
    assert spread([3.0]).median == spread([3.0]).low == 3.0
    assert (spread([1, 2, 3, 4, 5]).low, spread([1, 2, 3, 4, 5]).median, spread([1, 2, 3, 4, 5]).high) == (2, 3, 4)


def test_peak_counts_what_lives_at_the_same_time() -> None:
    def run() -> None:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first
        third = second * 2  # still 8000: the first is gone
        view = third.view(10, 100)  # no new storage
        view.add_(1)
        del second, third, view

    gc.collect()
    assert peak_bytes(run, CPU) == 8000


def test_peak_ignores_what_was_there_before() -> None:
    weight = torch.zeros(1000)
    assert peak_bytes(lambda: weight.view(10, 100).add_(1), CPU) == 0


class _Clock:
    """Time that passes only where a module of the model says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class _Slow(nn.Module):
    def __init__(self, inner: nn.Module, seconds: float, clock: _Clock) -> None:
        super().__init__()
        self.inner = inner
        self.seconds = seconds
        self.clock = clock

    def forward(self, *args, **kwargs):
        self.clock.now += self.seconds
        return self.inner(*args, **kwargs)


def test_spans_end_where_they_say(monkeypatch) -> None:
    """Delays put into tower and decoder show up in their own span and in no other."""
    clock = _Clock()
    monkeypatch.setattr("lmmhooks.bench.passes.time", clock)
    model = build_model("test-shape")
    prompt = make_prompt(model)
    family = resolve(model)
    model.model.multi_modal_projector = _Slow(model.model.multi_modal_projector, 0.25, clock)
    family.layers[1] = _Slow(family.layers[1], 0.5, clock)
    slow = timed_pass(family, prompt, decode_tokens=1)
    assert (slow.vision, slow.decoder, slow.prefill, slow.decode) == (250, 500, 750, 500)
    assert timed_pass(family, prompt).decode == 0


def test_attention_variant(model, prompt) -> None:
    cost = measure_variant(model, prompt, ["var(sink_dims='any')"], repeat=2, decode_tokens=2)
    assert cost.kinds == ["attention"]
    assert set(cost.ratios) == {"vision", "decoder", "prefill", "decode"}
    assert all(0 < one.low <= one.median <= one.high for one in cost.ratios.values())
    assert (cost.over_limit, cost.over_suffixes, cost.over_naive) == (None, None, None)
    assert (cost.flops_ratio, cost.kv_ratio, cost.average_visual) == (1.0, 1.0, 64.0)
    # Explicit rows have to be kept somewhere, and the meter sees them.
    assert cost.peak_bytes > cost.peak_bytes_plain > 0
    with pytest.raises(lmmhooks.MethodError, match="no prompt has run"):
        _ = lmmhooks.wrap(model, "var(sink_dims='any')").stats
    lmmhooks.unwrap(model)


def test_reduction_variant_has_a_limit(model, prompt) -> None:
    cost = measure_variant(model, prompt, ["fastv(keep=16, layer=2)"], repeat=2, decode_tokens=0)
    assert cost.visual_kept == [64, 64, 16, 16]
    assert cost.average_visual == 40.0
    assert cost.over_limit is not None
    assert cost.over_limit.median > 0
    assert cost.kv_ratio == pytest.approx((80 + 32) / (2 * 80))
    assert cost.flops_ratio < 1
    assert "decode" not in cost.ratios


def test_branches_are_held_against_suffixes_and_the_naive_loop(model, prompt) -> None:
    cost = measure_variant(model, prompt, ["vcd"], repeat=2, decode_tokens=2)
    assert cost.over_suffixes is not None
    assert cost.over_naive is not None
    assert cost.over_suffixes.median > 0
    assert cost.over_naive.median > 0
    assert (cost.branches, cost.flops_ratio) == (2, 2.0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Of 80 tokens the 15 before the image are those of the main rows.
        ("vcd", [(80, 0, 1), (80, 15, 1)]),
        ("m3id", [(80, 0, 1), (16, 15, 1)]),
        ("vdd(token=3)", [(80, 0, 1), (16, 15, 1), (17, 15, 1)]),
        ("damro(topk=4)", [(80, 0, 1), (20, 15, 1)]),
        ("icd(disturbance=(5, 6, 7))", [(80, 0, 1), (83, 79, 1)]),
        ("avisc", [(80, 0, 1), (80, 15, 1)]),
        # It hides visual tokens from layer 2 of 4 on, and asks about layer 1.
        ("sid", [(80, 0, 1), (80, 15, 0.75)]),
    ],
)
def test_what_branches_have_to_read(model, prompt, method, expected) -> None:
    with lmmhooks.wrap(model, method) as patch:
        found = read_branches(patch.family, patch.methods[0], prompt)
    assert [(one.embeds.shape[1], one.shared, one.layers) for one in found] == expected
    assert {one.embeds.shape[0] for one in found} == {2}


def test_the_naive_loop_gives_the_same_answer_again(model, prompt, monkeypatch) -> None:
    """It decodes the real branches; a second run starts where the first did."""
    with lmmhooks.wrap(model, "vcd(beta=0)") as patch:
        readings = read_branches(patch.family, patch.methods[0], prompt)
        expected = model.generate(**prompt.inputs, max_new_tokens=4)[:, -4:]
    seen: list[torch.Tensor] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loop = naive_loop(resolve(model), readings, 3)
    assert loop() > 0
    assert loop() > 0
    hook.remove()
    # Two branches are weighted 2 and -1, as VCD does.
    assert torch.equal(torch.cat(seen[:3], dim=1), expected[:, :3])
    assert torch.equal(torch.cat(seen[3:], dim=1), expected[:, :3])


def test_suffixes_are_read_behind_what_is_shared(model, prompt) -> None:
    with lmmhooks.wrap(model, "m3id") as patch:
        readings = read_branches(patch.family, patch.methods[0], prompt)
    read: list[tuple[int, int]] = []
    family = resolve(model)
    hook = family.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(
            (kwargs["inputs_embeds"].shape[1], kwargs["past_key_values"].get_seq_length())
        ),
        with_kwargs=True,
    )
    assert suffix_pass(family, readings) > 0
    hook.remove()
    assert read == [(80, 0), (1, 15)]


def test_beams_are_held_against_beams(model, prompt) -> None:
    cost = measure_variant(model, prompt, ["opera"], repeat=2, decode_tokens=3, num_beams=2)
    assert set(cost.ratios) == {"prefill", "decode"}
    assert (cost.over_suffixes, cost.over_naive, cost.branches) == (None, None, 1)


def test_disabled_leaves_the_model_unwrapped(model, prompt) -> None:
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    ratios = measure_disabled(model, prompt, ["var(sink_dims='any')"], repeat=2, decode_tokens=1)
    assert set(ratios) == {"vision", "decoder", "prefill", "decode"}
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
