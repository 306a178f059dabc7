"""The shipped quickstart on the shipped model, small: every variant runs, and the figures come with intervals."""

from __future__ import annotations

import json
from pathlib import Path

from lmmhooks_eval.recipes import load as load_recipe
from tests.cli.invoke import invoke


def test_quickstart_reports_baseline_and_variants_with_intervals(tmp_path: Path) -> None:
    outcome = invoke("run", "quickstart", "--limit", "18", "--out", str(tmp_path / "run"), "--json")
    assert outcome.status == 0, outcome.err
    recipe, printed = load_recipe("quickstart"), json.loads(outcome.out)
    assert set(printed["tasks"]) == {plan.name for plan in recipe.tasks}
    for task in printed["tasks"].values():
        assert list(task["variants"]) == ["baseline", *recipe.variants]
        for variant, figures in task["variants"].items():
            estimate = figures["metrics"][task["primary"]]
            low, high = estimate["interval"]
            assert 0 <= low <= high <= 1
            assert figures["failed"] == figures["unpaired"] == 0
            if "16" in variant:
                assert figures["cost"]["visual_kept"] == 16
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(variant in page for variant in recipe.variants)
    # A trained model: far above always saying yes, on questions of which half are to be answered with no.
    assert printed["tasks"]["scenes-pope"]["variants"]["baseline"]["metrics"]["accuracy"]["value"] > 0.65
