"""What the controls offer and write is what the methods accept."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from lmmhooks.errors import MethodError
from lmmhooks.methods.registry import all_methods, resolve
from lmmhooks.playground.choices import choices, dials, names, picked, read, turned


@pytest.fixture(scope="module")
def offered(loaded):
    return choices(loaded.family)


def test_every_method_is_offered_ready_to_run(offered, loaded) -> None:
    assert [each.id for each in offered] == list(all_methods())
    for each in offered:
        method = resolve(each.spec)
        assert resolve(method.spec()) == method
        if method.kind == "reduction" and each.refusal is None:
            method.check(loaded.family)


def test_what_the_conformance_tests_found_refused_is_said(loaded) -> None:
    qwen = SimpleNamespace(name="qwen2_5_vl")
    found = {each.id: each for each in choices(qwen)}
    assert found["ats"].refusal == "refused: attends inside windows"
    assert found["ats"].label == "ats (reduction, not on this model)"
    assert found["fastv"].refusal is None
    assert found["fastv"].label == "fastv (reduction)"


def test_offering_asks_no_network(loaded, monkeypatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something was asked of a network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    choices(loaded.family)


def test_reducers_start_with_a_budget(offered) -> None:
    specs = {each.id: each.spec for each in offered}
    assert specs["fastervlm"] == "fastervlm(keep=0.5)"
    assert specs["fastv"] == "fastv", "its own default is a share already"
    assert specs["vcd"] == "vcd"


def test_support_is_that_of_the_conformance_tests(offered) -> None:
    families = {each.id: each.families for each in offered}
    assert "llava" in families["fastv"]


def test_every_dial_stays_within_what_its_method_allows(offered, loaded) -> None:
    moved = 0
    for each in offered:
        for dial in dials(each.spec, loaded.family) if each.refusal is None else ():
            assert dial.low <= dial.value <= dial.high, dial
            assert dial.low < dial.high
            for value in (dial.low, dial.high, dial.low + 3 * dial.step):
                text = turned(each.spec, dial, value)
                assert getattr(resolve(text), dial.setting) == pytest.approx(value, abs=1e-6), dial
                moved += 1
    assert moved > 100


def test_counts_stay_counts(loaded) -> None:
    [dial, *_] = dials("fastv(keep=16)", loaded.family)
    assert (dial.setting, dial.low, dial.high, dial.step) == ("keep", 1, loaded.family.tokens_per_image, 1)
    assert turned("fastv(keep=16)", dial, 8.0) == "fastv(keep=8)"


def test_a_dial_moves_its_own_method_only(loaded) -> None:
    text = "fastv(keep=0.25) + vcd(alpha=0.5)"
    dial = next(each for each in dials(text, loaded.family) if each.method == "vcd" and each.setting == "alpha")
    assert turned(text, dial, 0.75) == "fastv(keep=0.25) + vcd(alpha=0.75)"
    with pytest.raises(MethodError, match="no longer"):
        turned("vcd(alpha=0.5)", dial, 0.75)


def test_picking_keeps_what_was_written(offered) -> None:
    text = picked("", ["fastv"], offered)
    assert text == "fastv"
    text = picked("fastv(keep=8)", ["vcd", "fastv"], offered)
    assert text == "fastv(keep=8) + vcd"
    assert names(text) == ["fastv", "vcd"]
    assert picked(text, ["vcd"], offered) == "vcd"
    assert picked("fastv(", ["vcd"], offered) == "vcd"


def test_text_that_cannot_be_read_offers_nothing(loaded) -> None:
    assert dials("fastv(", loaded.family) == []
    assert names("nonsense") == []
    with pytest.raises(MethodError, match="no method is picked"):
        read("  ")
