"""Questions go to the model one after the other, their answers come in while they grow, and nothing is left behind."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

import lmmhooks
from lmmhooks.comparison import Comparison
from lmmhooks.errors import LmmhooksError, MethodError, PromptError
from lmmhooks.playground import session as module
from lmmhooks.playground.session import _Stream, sentence
from lmmhooks.prompting import answer, build_inputs

FEW = "mvp(topk=1, caption_tokens=4, path_tokens=4, weights=(1.0, 0.0, 0.0))"


def test_answers_are_those_of_the_library(session, scene) -> None:
    seen = list(session.ask(scene.image, scene.question, "fastv(keep=0.25) + vcd", max_new_tokens=12))
    last = seen[-1]
    assert isinstance(last.comparison, Comparison)
    assert all(progress.comparison is None for progress in seen[:-1])
    plain = answer(session.model, session.processor, scene.image, scene.question, max_new_tokens=12, do_sample=False)
    with lmmhooks.wrap(session.model, "fastv(keep=0.25)", "vcd", processor=session.processor) as patch:
        patched = patch.answer(scene.image, scene.question, max_new_tokens=12, do_sample=False)
    assert (last.baseline, last.patched) == (plain, patched)
    assert last.comparison.runs[1].stats.average_visual < last.comparison.baseline.stats.average_visual


def test_text_grows_token_by_token(session, scene) -> None:
    stream = _Stream(session.processor.tokenizer)
    grown: list[tuple[str, str]] = []
    put = stream.put

    def noting(value) -> None:
        put(value)
        grown.append(stream.texts)

    stream.put = noting  # type: ignore[method-assign]
    inputs = build_inputs(session.processor, [scene.image], scene.question)
    with torch.inference_mode():
        for _ in range(2):
            session.model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=stream)
    first = [baseline for baseline, patched in grown if not patched]
    assert len(set(first)) > 3
    assert all(after.startswith(before) for before, after in pairwise(first))
    # The second generation is the patched model's: the baseline's text stays, and the same words come again.
    assert grown[-1][0] == grown[-1][1] == first[-1]


def test_replies_of_a_batch_are_not_mixed(session) -> None:
    stream = _Stream(session.processor.tokenizer)
    stream.put(torch.ones(2, 5, dtype=torch.long))
    stream.put(torch.tensor([20, 21]))
    assert stream.texts == ("", "")


def test_stop_ends_the_answer_and_the_next_one_comes(session, scene) -> None:
    asking = session.ask(scene.image, scene.question, "vcd", max_new_tokens=400)
    session_thread = threading.active_count()
    stopped = False
    for progress in asking:
        if not stopped:
            session.stop()
            stopped = True
        last = progress
    assert last.comparison is None
    assert last.stopped
    assert threading.active_count() <= session_thread
    again = list(session.ask(scene.image, scene.question, "vcd", max_new_tokens=2))
    assert again[-1].comparison is not None


def test_nothing_goes_on_when_nobody_listens(session, scene) -> None:
    before = threading.active_count()
    asking = session.ask(scene.image, scene.question, "vcd", max_new_tokens=400)
    next(asking)
    asking.close()
    assert threading.active_count() == before
    assert list(session.ask(scene.image, scene.question, "vcd", max_new_tokens=2))[-1].comparison is not None


def test_one_question_at_a_time(session, scene) -> None:
    asking = session.ask(scene.image, scene.question, "vcd", max_new_tokens=400)
    next(asking)
    with pytest.raises(PromptError, match="another question"):
        next(session.ask(scene.image, scene.question, "vcd"))
    asking.close()


def test_methods_are_refused_before_the_model_runs(session, scene, monkeypatch) -> None:
    monkeypatch.setattr(module, "compare", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(MethodError, match="more than the"):
        list(session.ask(scene.image, scene.question, "fastv(keep=100000)"))


@pytest.mark.parametrize(
    ("image", "question", "methods", "message"),
    [
        (None, "what is it?", "vcd", "no image"),
        ("scene", "  ", "vcd", "question is empty"),
        ("scene", "what is it?", "", "no method is picked"),
        ("scene", "what is it?", "fastvv", "did you mean 'fastv'"),
    ],
)
def test_bad_input_is_a_sentence(session, scene, image, question, methods, message) -> None:
    given = scene.image if image == "scene" else image
    with pytest.raises(LmmhooksError, match=message) as caught:
        list(session.ask(given, question, methods, max_new_tokens=2))
    assert "\n" not in sentence(caught.value)


def test_methods_that_judge_beams_answer_at_once(session, scene) -> None:
    last = list(session.ask(scene.image, scene.question, "opera", max_new_tokens=6))[-1]
    settings = {"max_new_tokens": 6, "num_beams": 5, "do_sample": False}
    assert last.baseline == answer(session.model, session.processor, scene.image, scene.question, **settings)
    with lmmhooks.wrap(session.model, "opera", processor=session.processor) as patch:
        assert last.patched == patch.answer(scene.image, scene.question, **settings)


@pytest.mark.parametrize("methods", ["opera", FEW.replace("caption_tokens=4", "caption_tokens=300")])
def test_stop_reaches_what_is_not_streamed(session, scene, methods) -> None:
    asking = session.ask(scene.image, scene.question, methods, max_new_tokens=300)
    timer = threading.Timer(0.3, session.stop)
    timer.start()
    assert list(asking)[-1].comparison is None
    timer.join()


def test_methods_that_ask_several_times_answer_too(session, scene) -> None:
    last = list(session.ask(scene.image, "Is there a car in the image?", FEW, max_new_tokens=4))[-1]
    with lmmhooks.wrap(session.model, FEW, processor=session.processor) as patch:
        assert last.patched == patch.answer(scene.image, "Is there a car in the image?", max_new_tokens=4)


def test_unexpected_errors_reach_page_and_terminal(capsys) -> None:
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError as error:
        said = sentence(error)
    assert said == "RuntimeError: first (the terminal has the traceback)"
    assert "Traceback" in capsys.readouterr().err
    assert sentence(MethodError("keep is\n too large")) == "keep is too large"
