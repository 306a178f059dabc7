"""Pages that are files: they open from the disk, alone, on a phone and on a desktop, by day and by night."""

from __future__ import annotations

from pathlib import Path

import pytest

import lmmhooks
from lmmhooks.prompting import build_inputs
from lmmhooks_eval.report import load_view, write_html
from lmmhooks_eval.score import score_run
from tests.browser.conftest import WIDTHS
from tests.eval.runs import answer, documents, opposite, perfect, write_run

LEAST_CONTRAST = 4.5
"""Of WCAG 2 (AA) for text of ordinary size."""

# Pictures that cannot be shown; those far below, which the page leaves for later, are loaded now.
BROKEN = """
async () => {
  const pictures = Array.from(document.images);
  pictures.forEach(picture => { picture.loading = 'eager'; });
  const shown = await Promise.allSettled(pictures.map(picture => picture.decode()));
  return shown.filter(each => each.status !== 'fulfilled').length;
}
"""


@pytest.fixture(scope="module")
def model():
    return lmmhooks.load("tiny-llava", device="cpu")


@pytest.fixture(scope="module")
def scene():
    from lmmhooks.playground.examples import examples

    return examples()[0]


@pytest.fixture(scope="module")
def comparison_page(model, scene, tmp_path_factory) -> Path:
    methods = ["fastv(keep=0.25)", ["uniform-grid(keep=4)", "vcd"]]
    compared = lmmhooks.compare(*model, scene.image, scene.question, methods, max_new_tokens=8)
    return compared.to_html(tmp_path_factory.mktemp("comparison") / "page.html")


@pytest.fixture(scope="module")
def sinks_page(model, scene, tmp_path_factory) -> Path:
    loaded, processor = model
    inputs = build_inputs(processor, [scene.image], scene.question, loaded.device, loaded.dtype)
    report = lmmhooks.inspect.sinks(loaded, inputs, processor)
    return report.to_html(tmp_path_factory.mktemp("sinks") / "page.html")


@pytest.fixture(scope="module")
def run_page(tmp_path_factory) -> Path:
    docs = documents()
    records = [answer(doc, "baseline", opposite(doc) if i < 18 else perfect(doc)) for i, doc in enumerate(docs)]
    records += [answer(doc, "v", perfect(doc)) for doc in docs]
    run = write_run(tmp_path_factory.mktemp("run") / "run", records)
    score_run(run)
    return write_html([load_view(run)], run / "report.html")


PAGES = ("comparison_page", "sinks_page", "run_page")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", list(WIDTHS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_alone(name, width, scheme, visit, request) -> None:
    seen = visit(request.getfixturevalue(name).as_uri(), width=width, scheme=scheme)
    assert seen.page.locator("h1").first.inner_text()
    assert seen.sideways() <= 0
    assert seen.page.evaluate(BROKEN) == 0
    contrast, text = seen.least_contrast()
    assert contrast >= LEAST_CONTRAST, text
    seen.assert_quiet()


@pytest.mark.parametrize("name", PAGES)
def test_dark_is_another_page_than_light(name, visit, request) -> None:
    url = request.getfixturevalue(name).as_uri()
    (ink, paper), (night_ink, night_paper) = (visit(url, scheme=scheme).colours() for scheme in ("light", "dark"))
    assert paper != night_paper
    assert ink != night_ink
