"""The page, laid out with gradio; what it does is in `session`, `choices` and `rendering`."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from lmmhooks.comparison import Comparison
from lmmhooks.playground import rendering
from lmmhooks.playground.choices import Choice, Dial, choices, dials, names, picked, turned
from lmmhooks.playground.examples import examples
from lmmhooks.playground.session import Progress, Session, sentence

__all__ = ["application", "build"]

FONTS = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")
HOUR = 3600


def application(session: Session, port: int) -> FastAPI:
    """
    The page as an application for a server on the loopback address.

    Parameters
    ----------
    session
        The model.
    port
        On which it is going to be served.
    """
    theme = gr.themes.Base(font=FONTS, font_mono=MONOSPACE)
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build(session),
        path="/",
        server_name="127.0.0.1",
        server_port=port,
        theme=theme,
        css=(files("lmmhooks") / "templates" / "playground.css").read_text(encoding="utf-8"),
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size="20mb",
    )


def build(session: Session) -> gr.Blocks:
    """The page about one model; gradio reports nothing of its use, and forgets pictures after a day."""
    offered = choices(session.family)
    title = f"lmmhooks playground: {session.name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(f"## {title}\n{_described(session)}", sanitize_html=True)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls = _controls(session, offered)
            with gr.Column(scale=3, min_width=300):
                answers = gr.HTML(elem_id="answers", value="", label="Answers")
                with gr.Accordion("Report: maps per token, curves, differences, cost", open=False):
                    report = gr.HTML(elem_id="report", value="")
                    file = gr.DownloadButton("Save the report", interactive=False)
        _wire(session, controls, answers, report, file)
    return page


def _described(session: Session) -> str:
    family = session.family
    weight = next(session.model.parameters())
    tokens = f", {family.tokens_per_image} visual tokens per image" if family.tokens_per_image else ""
    kind = str(weight.dtype).removeprefix("torch.")
    return f"{family.name}, {family.num_layers} layers{tokens}, {kind}, {weight.device}"


class _Controls:
    """The inputs of the page."""

    image: gr.Image
    question: gr.Textbox
    chosen: gr.Dropdown
    methods: gr.Textbox
    about: gr.HTML
    drawn: gr.State
    length: gr.Slider
    ask: gr.Button
    stop: gr.Button


def _controls(session: Session, offered: list[Choice]) -> _Controls:
    controls = _Controls()
    controls.image = gr.Image(
        label="Image", type="pil", image_mode="RGB", sources=["upload", "clipboard"], height=260, elem_id="image"
    )
    controls.question = gr.Textbox(label="Question", lines=1, max_lines=4, elem_id="question")
    shown = [list(example) for example in examples()]
    gr.Examples(shown, [controls.image, controls.question], label="Bundled scenes", cache_examples=False)
    controls.chosen = gr.Dropdown(
        [(each.label, each.id) for each in offered], multiselect=True, label="Methods", elem_id="chosen"
    )
    controls.about = gr.HTML(value="", elem_id="about")
    controls.methods = gr.Textbox(
        label="As they run",
        info="name(setting=value), joined by ' + '; every setting may be written here.",
        lines=2,
        elem_id="methods",
    )
    controls.drawn = gr.State("")

    @gr.render(inputs=[controls.drawn])
    def sliders(text: str) -> None:
        for dial in dials(text, session.family):
            _slider(dial, controls.methods)

    controls.length = gr.Slider(1, 512, value=64, step=1, label="Longest answer, tokens")
    with gr.Row():
        controls.ask = gr.Button("Ask", variant="primary", elem_id="ask")
        controls.stop = gr.Button("Stop", elem_id="stop")
    return controls


def _slider(dial: Dial, methods: gr.Textbox) -> None:
    label = f"{dial.method}: {dial.setting}"
    slider = gr.Slider(dial.low, dial.high, value=dial.value, step=dial.step, label=label, info=dial.help)

    def turn(text: str, value: float) -> str:
        try:
            return turned(text, dial, value)
        except ValueError:
            # The text is being rewritten at this moment; new sliders for it are on their way.
            return text

    slider.input(
        turn,
        [methods, slider],
        methods,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )


def _wire(session: Session, controls: _Controls, answers: gr.HTML, report: gr.HTML, file: gr.DownloadButton) -> None:
    """What happens on a click."""
    offered = choices(session.family)
    folder = tempfile.TemporaryDirectory(prefix="lmmhooks-")

    def pick(text: str, wanted: list[str]) -> tuple[str, str, str]:
        new = picked(text, wanted, offered)
        return new, new, _about(names(new), offered)

    def rewritten(text: str) -> tuple[list[str], str, str]:
        found = names(text)
        return found, text, _about(found, offered)

    def ask(image: Any, question: str, methods: str, length: int) -> Iterator[tuple[Any, ...]]:
        yield rendering.cards(Progress(), methods), "", gr.DownloadButton(interactive=False)
        try:
            for progress in session.ask(image, question, methods, int(length)):
                shown = rendering.cards(progress, methods)
                if progress.comparison is None:
                    yield shown, gr.skip(), gr.skip()
                else:
                    yield shown, *_report(progress.comparison, Path(folder.name))
        except Exception as error:
            yield rendering.problem(sentence(error)), "", gr.DownloadButton(interactive=False)

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    controls.chosen.input(
        pick, [controls.methods, controls.chosen], [controls.methods, controls.drawn, controls.about], **quiet
    )
    for event in (controls.methods.submit, controls.methods.blur):
        event(rewritten, controls.methods, [controls.chosen, controls.drawn, controls.about], **quiet)
    gr.on(
        [controls.ask.click, controls.question.submit],
        ask,
        [controls.image, controls.question, controls.methods, controls.length],
        [answers, report, file],
        show_progress="minimal",
        concurrency_limit=1,
        api_visibility="private",
    )
    controls.stop.click(session.stop, **quiet)


def _about(chosen: list[str], offered: list[Choice]) -> str:
    """A line for every picked method: what it does, where it was tested, and whether this model refuses it."""
    known = {each.id: each for each in offered}
    lines = []
    for each in (known[name] for name in chosen if name in known):
        tested = ", ".join(each.families) or "no family yet"
        line = f"<b>{escape(each.id)}</b>: {escape(each.summary)} Tested on {escape(tested)}."
        refused = f"<br>Not on this model: {escape(each.refusal)}" if each.refusal else ""
        lines.append(f"<p class='lmm-soft'>{line}{refused}</p>")
    return "".join(lines)


def _report(comparison: Comparison, folder: Path) -> tuple[str, Any]:
    """The report of `lmmhooks compare --html` in a frame, and as a file to keep."""
    # A name per report: the browser may still be fetching the one before.
    path = comparison.to_html(Path(tempfile.mkstemp(suffix=".html", prefix="comparison-", dir=folder)[1]))
    page = base64.b64encode(path.read_bytes()).decode()
    frame = (
        "<iframe class='lmm-report' title='Report' sandbox='allow-scripts' "
        f"src='data:text/html;charset=utf-8;base64,{page}'></iframe>"
    )
    return frame, gr.DownloadButton(value=str(path), interactive=True)
