"""The overhead measurement measures what it says; its figure is a benchmark and no test."""

from __future__ import annotations

from pathlib import Path

import lmmhooks
from lmmhooks_eval import overhead


def test_both_loops_answer_every_document(model_folder: Path, monkeypatch) -> None:
    model, processor = lmmhooks.load(model_folder, dtype="float32")
    answered: dict[str, list[int]] = {"bare": [], "harness": []}
    bare, carry_out = overhead._bare, overhead.Runner.carry_out

    def counting_bare(*arguments):
        texts = bare(*arguments)
        answered["bare"].append(len(texts))
        return texts

    def counting_pass(self, each):
        carry_out(self, each)
        answered["harness"].append(len(self.folder.answered))

    monkeypatch.setattr(overhead, "_bare", counting_bare)
    monkeypatch.setattr(overhead.Runner, "carry_out", counting_pass)
    result = overhead.measure_overhead(model, processor, task="scenes-vqa", documents=9, batch_size=4, repeats=2)
    assert answered["bare"] == answered["harness"] == [result.documents] * 3  # one pair to warm up
    assert len(result.bare_s) == len(result.harness_s) == 2
    ratios = sorted(b / a for a, b in zip(result.bare_s, result.harness_s, strict=True))
    assert result.overhead == sum(ratios) / 2 - 1
