"""A paper's figures: refused where they fit nothing, and printed beside ours where they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.recipes import build
from lmmhooks_eval.report import load_view, print_report, write_html
from lmmhooks_eval.report.tables import notes, paper_table
from lmmhooks_eval.runner import run as run_recipe
from lmmhooks_eval.score import score_run
from tests.eval.runs import answer, documents, opposite, perfect, write_run

SOURCE = "A paper, arXiv 0000.00000, table 1"


def block(results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"source": SOURCE, "model": "tiny-llava", "unit": "percent", "results": results, **changes}


def figures(accuracy: dict[str, float]) -> dict[str, Any]:
    return {"scenes-pope": {"accuracy": accuracy}}


def write(path: Path, paper: Any, **changes: Any) -> Path:
    """Baseline right on 18 of 36, variant on all."""
    docs = documents()
    records = [answer(doc, "baseline", opposite(doc) if i < 18 else perfect(doc)) for i, doc in enumerate(docs)]
    records += [answer(doc, "v", perfect(doc)) for doc in docs]
    return write_run(path, records, paper=paper, **changes)


@pytest.mark.parametrize(
    ("paper", "parts"),
    [
        (block({"scenes-poop": {"accuracy": {"v": 1}}}), ["task that this recipe does not run", "mean 'scenes-pope'"]),
        (
            block(figures({"vv": 1})),
            ["variant that this recipe does not have, 'vv'", "did you mean 'v'", "baseline, v"],
        ),
        (block({"scenes-pope": {"accuracy": {}}}), ["no figures for accuracy of task 'scenes-pope'"]),
        (block({"scenes-pope": {}}), ["no figures for any metric of task 'scenes-pope'"]),
        (block({}), ["paper", "at least 1 item"]),
        (block(figures({"v": 1}), unit="points"), ["unit", "'percent' or 'share'", "got 'points'"]),
        (block(figures({"v": 1}), table=3), ["unknown key 'paper.0.table'", "source"]),
        ({**block(figures({"v": 1})), "source": ""}, ["paper.0.source", "at least 1 character"]),
    ],
)
def test_blocks_that_fit_nothing_are_refused_when_the_recipe_is_read(paper: Any, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        build({"name": "r", "model": "m", "tasks": ["scenes-pope"], "variants": {"v": "var"}, "paper": paper}, "r.yaml")
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("paper", "message"),
    [
        (block({"scenes-pope": {"acuracy": {"v": 1}}}), "no metric 'acuracy'; did you mean 'accuracy'"),
        (block(figures({"v": 101})), "accuracy of v is 101, but a figure in unit percent lies in 0 to 100"),
        (
            block(figures({"baseline": 85.9}), unit="share"),
            "a figure in unit share lies in 0 to 1; correct it or the unit",
        ),
    ],
)
def test_metrics_and_units_are_checked_before_a_model_is_loaded(tmp_path: Path, paper: Any, message: str) -> None:
    recipe = {"name": "r", "model": "no/such-model", "tasks": ["scenes-pope"], "variants": {"v": "var"}, "paper": paper}
    with pytest.raises(RecipeError, match=message):
        run_recipe(build(recipe, "r.yaml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_differences_and_gains_by_hand(tmp_path: Path) -> None:
    scored = score_run(write(tmp_path, block(figures({"baseline": 60, "v": 70}))))
    baseline, variant = scored["tasks"]["scenes-pope"]["paper"]
    assert baseline["variant"] == "baseline"
    ours = scored["tasks"]["scenes-pope"]["variants"]["baseline"]["metrics"]["accuracy"]["value"]
    assert ours == pytest.approx(0.5, abs=0.01)  # 18 of 36, as the mean of three splits that are not quite even
    assert (baseline["paper"], baseline["ours"]) == (0.6, ours)
    assert baseline["difference"] == pytest.approx(ours - 0.6)
    assert baseline["paper_gain"] is baseline["gain"] is baseline["reproduced"] is None
    estimate = scored["tasks"]["scenes-pope"]["variants"]["v"]["metrics"]["accuracy"]
    assert variant["paper"] == pytest.approx(0.7)
    assert (variant["ours"], variant["interval"]) == (1.0, estimate["interval"])
    assert variant["paper_gain"] == pytest.approx(0.1)
    assert variant["gain"] == pytest.approx(1 - ours)
    assert variant["gain_interval"] == estimate["difference_interval"]
    assert variant["reproduced"] is False  # half of 36 flipped: the interval is far from 0.1


def test_a_gain_inside_the_interval_is_reproduced(tmp_path: Path) -> None:
    share = block(figures({"baseline": 0.42, "v": 0.92}), unit="share")
    (_, variant) = score_run(write(tmp_path, share))["tasks"]["scenes-pope"]["paper"]
    assert variant["reproduced"] is True


def test_what_one_side_lacks_is_left_open(tmp_path: Path) -> None:
    only_method = block(figures({"v": 70}))
    (row,) = score_run(write(tmp_path / "a", only_method))["tasks"]["scenes-pope"]["paper"]
    assert row["gain"] == pytest.approx(0.5, abs=0.01)
    assert row["paper_gain"] is row["reproduced"] is None
    docs = documents()
    unanswered = write_run(
        tmp_path / "b", [answer(doc, "baseline", perfect(doc)) for doc in docs], paper=block(figures({"v": 70}))
    )
    task = score_run(unanswered)["tasks"]["scenes-pope"]
    assert task["paper"][0]["ours"] is task["paper"][0]["gain"] is None
    table = paper_table("scenes-pope", task)
    assert table is not None
    assert [cell.text for cell in table.rows[0]][1:-1] == ["70.0", "-", "-", "-", "-", "-"]


def test_figures_of_another_checkpoint_are_not_compared(tmp_path: Path) -> None:
    scored = score_run(write(tmp_path, block(figures({"v": 70}), model="llava-hf/llava-1.5-7b-hf")))
    assert scored["tasks"]["scenes-pope"]["paper"] == []
    assert paper_table("scenes-pope", scored["tasks"]["scenes-pope"]) is None
    assert any("are for llava-hf/llava-1.5-7b-hf and are not compared" in line for line in notes(scored))


def test_several_papers_and_lengths_stand_side_by_side(tmp_path: Path) -> None:
    caption = documents("scenes-caption", 2)
    records = [answer(doc, variant, "a cup", task="scenes-caption") for doc in caption for variant in ("baseline", "v")]
    first = block({"scenes-caption": {"length": {"baseline": 83.06}}}, notes="Lengths in words.")
    second = block({"scenes-caption": {"chair_s": {"baseline": 46.4, "v": 20.4}}}, source="Another, table 2")
    run = write_run(tmp_path, records, tasks=[{"name": "scenes-caption"}], paper=[first, second])
    rows = score_run(run)["tasks"]["scenes-caption"]["paper"]
    assert [(row["source"], row["metric"], row["paper"]) for row in rows] == [
        (SOURCE, "length", 83.06),  # no share: as printed
        ("Another, table 2", "chair_s", pytest.approx(0.464)),
        ("Another, table 2", "chair_s", pytest.approx(0.204)),
    ]


def test_console_and_page_show_the_table(tmp_path: Path) -> None:
    path = write(tmp_path, block(figures({"baseline": 60, "v": 70}), notes="Seeds unknown."))
    view = load_view(path)
    console = Console(width=240, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    print_report(console, view)
    page = write_html([view], path / "report.html").read_text(encoding="utf-8")
    for text in (console.export_text(), page):
        assert "the paper's figures" in text.replace("&#39;", "'")
        assert SOURCE in text
        assert "-9.4" in text
        assert "Seeds unknown." in text


def test_a_run_may_go_on_after_its_paper_block_was_corrected(tmp_path: Path) -> None:
    from lmmhooks_eval.store import RunFolder

    path = write(tmp_path, block(figures({"v": 70})))
    from tests.eval.runs import RECIPE

    corrected = build({**RECIPE, "paper": block(figures({"v": 71}))}, "test").expanded()
    with RunFolder(path, corrected, resume=True) as folder:
        assert len(folder.answered) == 72
