"""The measurement of lazy branches counts steps and compares answers; its times are a benchmark and no test."""

from __future__ import annotations

from pathlib import Path

import pytest

import lmmhooks
from lmmhooks_eval.branching import measure_branches


def test_steps_and_answers_are_those_of_the_methods(model_folder: Path) -> None:
    model, processor = lmmhooks.load(model_folder, dtype="float32")
    # Nothing but the most likely token is plausible, ever; everything is, nearly.
    methods = [lmmhooks.method("vcd", beta=1.0), lmmhooks.method("m3id", beta=1e-30)]
    decided, open_ = measure_branches(model, processor, methods, documents=2, repeat=1)
    assert (decided.method, open_.method) == ("vcd(beta=1.0)", "m3id(beta=1e-30)")
    assert (decided.steps_run, decided.ambiguous) == (0, 0.0)
    assert (open_.steps_run, open_.ambiguous) == (open_.steps, 1.0)
    assert decided.steps > 0
    assert min(decided.identical, open_.identical) >= 1
    assert decided.eager.median > 0
    assert open_.lazy.median > 0
    with pytest.raises(lmmhooks.MethodError, match="no branches"):
        measure_branches(model, processor, [lmmhooks.method("var")], documents=1, repeat=1)
    with pytest.raises(lmmhooks.MethodError, match="lazy"):
        measure_branches(model, processor, [lmmhooks.method("vcd", beta=0.0)], documents=1, repeat=1)
