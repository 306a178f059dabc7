"""The page, laid out with gradio; what it does is in `session`, `choices` and `rendering`."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
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
from lmmhooks.playground.session import Session, sentence

__all__ = ["application", "build"]

FONTS = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")
HOUR = 3600
HINT = "Choose a scene or drop a picture, pick methods, and ask: the answers appear here, side by side."


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
    # Names of fonts that systems have; gradio's own themes ask a font service. Its small print is too pale to read.
    theme = gr.themes.Base(font=FONTS, font_mono=MONOSPACE).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
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
                answers = gr.HTML(f"<p class='lmm-soft'>{HINT}</p>", elem_id="answers", label="Answers")
                with gr.Accordion("Report: maps per token, curves, differences, cost", open=False):
                    report = gr.HTML("", elem_id="report")
                    file = gr.DownloadButton("Save the report", interactive=False)
                about = gr.HTML("", elem_id="about")
        _wire(session, offered, controls, _Outputs(answers, report, file, about))
    return page


def _described(session: Session) -> str:
    family = session.family
    weight = next(session.model.parameters())
    tokens = f", {family.tokens_per_image} visual tokens per image" if family.tokens_per_image else ""
    kind = str(weight.dtype).removeprefix("torch.")
    return f"{family.name}, {family.num_layers} layers{tokens}, {kind}, {weight.device}"


@dataclass(frozen=True)
class _Outputs:
    """What the page shows."""

    answers: gr.HTML
    report: gr.HTML
    file: gr.DownloadButton
    about: gr.HTML


@dataclass(frozen=True)
class _Controls:
    """The inputs of the page."""

    image: gr.Image
    question: gr.Textbox
    scenes: gr.Gallery
    chosen: gr.Dropdown
    methods: gr.Textbox
    drawn: gr.State
    """The text that the sliders were drawn for; they stay while one of them changes the text."""
    length: gr.Slider
    ask: gr.Button
    stop: gr.Button


def _controls(session: Session, offered: list[Choice]) -> _Controls:
    image = gr.Image(
        label="Image", type="pil", image_mode="RGB", sources=["upload", "clipboard"], height=240, elem_id="image"
    )
    scenes = gr.Gallery(
        [(example.image, example.question) for example in examples()],
        label="Bundled scenes",
        show_label=False,
        elem_id="scenes",
        columns=3,
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
    )
    question = gr.Textbox(label="Question", lines=1, max_lines=4, elem_id="question")
    chosen = gr.Dropdown(
        [(each.label, each.id) for each in offered], multiselect=True, label="Methods", elem_id="chosen"
    )
    methods = gr.Textbox(
        label="As they run",
        info="name(setting=value), joined by ' + '; every setting may be written here.",
        lines=2,
        elem_id="methods",
    )
    drawn = gr.State("")

    @gr.render(inputs=[drawn])
    def sliders(text: str) -> None:
        for dial in dials(text, session.family):
            _slider(dial, methods)

    length = gr.Slider(1, 512, value=64, step=1, label="Longest answer, tokens")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=100)
        stop = gr.Button("Stop", elem_id="stop", min_width=100)
    return _Controls(image, question, scenes, chosen, methods, drawn, length, ask, stop)


def _slider(dial: Dial, methods: gr.Textbox) -> None:
    label = f"{dial.method}: {dial.setting}"
    slider = gr.Slider(
        dial.low, dial.high, value=dial.value, step=dial.step, label=label, info=dial.help, interactive=True
    )

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


def _wire(session: Session, offered: list[Choice], controls: _Controls, outputs: _Outputs) -> None:
    """What happens on a click."""
    folder = tempfile.TemporaryDirectory(prefix="lmmhooks-")

    def pick(text: str, wanted: list[str]) -> tuple[str, str, str]:
        new = picked(text, wanted, offered)
        return new, new, _about(names(new), offered)

    def rewritten(text: str) -> tuple[list[str], str, str]:
        found = names(text)
        return found, text, _about(found, offered)

    def ask(image: Any, question: str, methods: str, length: int) -> Iterator[tuple[Any, ...]]:
        empty = "", gr.DownloadButton(interactive=False)
        try:
            for progress in session.ask(image, question, methods, int(length)):
                found = progress.comparison
                report = empty if found is None else _report(found, Path(folder.name))
                yield rendering.cards(progress, methods), *report
        except Exception as error:
            yield rendering.problem(sentence(error)), *empty

    def take(event: gr.SelectData) -> tuple[Any, str]:
        return tuple(examples()[event.index])

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    controls.scenes.select(take, None, [controls.image, controls.question], **quiet)
    controls.chosen.input(
        pick, [controls.methods, controls.chosen], [controls.methods, controls.drawn, outputs.about], **quiet
    )
    for event in (controls.methods.submit, controls.methods.blur):
        event(rewritten, controls.methods, [controls.chosen, controls.drawn, outputs.about], **quiet)
    gr.on(
        [controls.ask.click, controls.question.submit],
        ask,
        [controls.image, controls.question, controls.methods, controls.length],
        [outputs.answers, outputs.report, outputs.file],
        show_progress="minimal",
        concurrency_limit=1,
        api_visibility="private",
    )
    # Beside the queue, in which the question it ends may be waiting for its turn.
    controls.stop.click(session.stop, queue=False, **quiet)


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
