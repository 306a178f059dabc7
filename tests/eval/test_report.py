"""Reports: what is emphasised, what is escaped, and that the page stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from lmmhooks_eval.report import load_view, print_report, write_html
from lmmhooks_eval.report.plots import cost_quality_plot, difference_plot
from lmmhooks_eval.report.tables import cost_table, headline, metrics_table
from lmmhooks_eval.score import score_run
from tests.eval.runs import answer, documents, opposite, perfect, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    docs = documents()
    records = [answer(doc, "baseline", opposite(doc) if i < 18 else perfect(doc)) for i, doc in enumerate(docs)]
    records += [answer(doc, "v", perfect(doc)) for doc in docs]
    records += [answer(doc, "<b>w", opposite(doc) if i < 17 else perfect(doc)) for i, doc in enumerate(docs)]
    return write_run(tmp_path / "run", records, variants={"v": ["var"], "<b>w": ["vcd"]})


def test_only_an_interval_that_excludes_zero_is_emphasised(run: Path) -> None:
    task = score_run(run)["tasks"]["scenes-pope"]
    table = headline("scenes-pope", task)
    tones = {row[0].text: row[2].tone for row in table.rows}
    assert tones == {"baseline": "", "v": "good", "<b>w": ""}
    low, high = task["variants"]["<b>w"]["metrics"]["accuracy"]["difference_interval"]
    assert low <= 0 <= high
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_lower_is_better_where_the_metric_says_so(run: Path) -> None:
    task = score_run(run)["tasks"]["scenes-pope"]
    task["metrics"]["accuracy"]["better"] = "lower"
    assert {row[0].text: row[2].tone for row in headline("t", task).rows}["v"] == "bad"
    task["metrics"]["accuracy"]["better"] = "neither"
    assert {row[0].text: row[2].tone for row in headline("t", task).rows}["v"] == ""


def test_other_tables_are_complete(run: Path) -> None:
    task = score_run(run)["tasks"]["scenes-pope"]
    costs = cost_table("scenes-pope", task)
    assert [row[0].text for row in costs.rows] == ["baseline", "v", "<b>w"]
    assert {len(row) for row in costs.rows} == {len(costs.columns)}
    shown = metrics_table("scenes-pope", task)
    assert len(shown.rows) == 24  # six figures for three splits and their means
    assert {len(row) for row in shown.rows} == {4}


class _Page(HTMLParser):
    """Collects tags, their attributes and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escaped(run: Path) -> None:
    text = write_html([load_view(run)], run / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert text.startswith("<!doctype html>")
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "script" not in page.tags
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", text, flags=re.DOTALL)
    assert "<b>w" not in text.replace("&lt;b&gt;w", "")
    assert page.tags.count("img") == 3 + 1  # three fixed by v, one fixed by the other
    assert page.tags.count("svg") == 2
    assert "No method is claimed to help unless its interval excludes 0." in page.text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_one_page_for_several_runs(run: Path, tmp_path: Path) -> None:
    views = [load_view(run), load_view(run)]
    text = write_html(views, tmp_path / "both.html").read_text(encoding="utf-8")
    assert text.count("<h1>") == 2


def test_examples_survive_a_missing_image(tmp_path: Path) -> None:
    doc = {**documents(number=1)[0], "image": "images/gone.png"}
    records = [answer(doc, "baseline", opposite(doc)), answer(doc, "v", perfect(doc))]
    path = write_run(tmp_path, records)
    text = write_html([load_view(path)], path / "report.html").read_text(encoding="utf-8")
    assert ">fixed</strong> by v" in text
    assert "<img" not in text


def test_plots_follow_the_pages_colours(run: Path) -> None:
    task = score_run(run)["tasks"]["scenes-pope"]
    for plot in (difference_plot(task, "a"), cost_quality_plot(task, "a")):
        assert plot is not None
        assert plot.startswith("<svg")
        assert "currentColor" in plot
        assert "#010203" not in plot
    used = [set(re.findall(r"url\(#([^)]+)\)", difference_plot(task, name) or "")) for name in ("a", "b")]
    assert used[0]
    assert not used[0] & used[1]  # the clip paths of two plots on one page stay apart


def test_nothing_to_plot_is_no_plot(tmp_path: Path) -> None:
    path = write_run(tmp_path, [answer(doc, "baseline", "Yes") for doc in documents()], variants={})
    task = score_run(path)["tasks"]["scenes-pope"]
    assert difference_plot(task, "a") is None
    assert cost_quality_plot(task, "a") is None


def test_the_console_shows_names_as_they_are(run: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    print_report(console, load_view(run))
    text = console.export_text()
    assert "<b>w" in text
    assert "No method is claimed to help unless its interval excludes 0." in text
