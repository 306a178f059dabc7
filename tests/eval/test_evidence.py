"""Margins and gaps that are read while a model answers, against its own logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lmmhooks
from lmmhooks.engines.watching import watched_scores
from lmmhooks_eval.effect import plausibility_cut
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.evidence import UNSAYABLE, Evidence, word_tokens
from lmmhooks_eval.generate import Answer, Generator
from lmmhooks_eval.metrics.yesno import WORDS
from lmmhooks_eval.plan import prepare
from lmmhooks_eval.task import AnswerWords
from lmmhooks_eval.tasks import get_task

TASK = get_task("scenes-pope")
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def generator(request: pytest.FixtureRequest) -> Generator:
    return Generator(*lmmhooks.load(request.param, dtype=torch.float32))


def _asked(generator: Generator, number: int = 5, step: int = 7) -> tuple[list[str], list[Any]]:
    docs = TASK.load()[: number * step : step]
    return [prepare(TASK, doc, generator.processor).prompt for doc in docs], [TASK.images(doc) for doc in docs]


def _ask(generator: Generator, generation: dict[str, Any] = GREEDY) -> list[Answer]:
    prompts, images = _asked(generator)
    return generator.ask(prompts, images, generation, 0, WORDS)[0]


def _reference(generator: Generator) -> torch.Tensor:
    return generator.first_logits(generator.inputs(*_asked(generator))).float()


def _margin(generator: Generator, logits: torch.Tensor) -> list[float]:
    yes, no = word_tokens(generator.processor.tokenizer, WORDS)
    odds = logits.softmax(-1)[:, yes].sum(-1).log() - logits.softmax(-1)[:, no].sum(-1).log()
    return [float(value) for value in odds]


def test_the_margin_is_the_log_odds_of_the_two_words(generator: Generator) -> None:
    answers = _ask(generator)
    # Stored with five digits.
    assert [answer.margin for answer in answers] == pytest.approx(_margin(generator, _reference(generator)), abs=1e-4)
    for answer in answers:
        assert answer.margin is not None
        if answer.text in ("Yes", "No"):
            assert (answer.margin > 0) == (answer.text == "Yes")


def test_warpers_and_processors_come_after_it(generator: Generator) -> None:
    plain = [answer.margin for answer in _ask(generator)]
    drawn = {"max_new_tokens": 2, "do_sample": True, "temperature": 0.3, "top_k": 1, "repetition_penalty": 1.7}
    assert [answer.margin for answer in _ask(generator, drawn)] == plain
    beams = [answer.margin for answer in _ask(generator, {**GREEDY, "num_beams": 3})]
    assert beams == pytest.approx(plain, abs=1e-4)


def test_gaps_are_those_of_every_step_of_the_answer(generator: Generator) -> None:
    prompts, images = _asked(generator)
    answers = _ask(generator)
    inputs = generator.inputs(prompts, images)
    out = generator.model.generate(
        **inputs, **generator._arguments(GREEDY), output_logits=True, return_dict_in_generate=True
    )
    for row, answer in enumerate(answers):
        steps = torch.stack([logits[row].float() for logits in out.logits[: answer.new_tokens]])
        best = steps.topk(2).values
        assert answer.gaps == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-3)
        keep = steps >= steps.amax(-1, keepdim=True) + math.log(0.1)
        assert [gap > math.log(10) for gap in answer.gaps or ()] == (keep.sum(-1) == 1).tolist()
    assert all(answer.gaps is None for answer in _ask(generator, {**GREEDY, "num_beams": 2}))


def _under(generator: Generator, method: str) -> list[Answer]:
    with lmmhooks.wrap(generator.model, method, processor=generator.processor):
        return _ask(generator)


def test_a_cut_changes_no_margin(generator: Generator) -> None:
    plain = [answer.margin for answer in _ask(generator)]
    assert [answer.margin for answer in _under(generator, "apc-only(beta=0.9)")] == pytest.approx(plain, abs=1e-4)
    for method in ("vcd", "icd", "mod", "sign-flip(of='vcd')", "dola"):
        cut = [answer.margin for answer in _under(generator, method)]
        assert all(margin is not None and abs(margin) < 100 for margin in cut), method


@pytest.mark.parametrize("method", ["vcd(alpha=1.0, beta={})", "ritual(alpha=2.0, beta={})", "m3id(beta={})"])
def test_the_margin_under_a_cut_is_that_of_the_method_without_one(generator: Generator, method: str) -> None:
    cut, whole = (_under(generator, method.format(beta)) for beta in (0.5, 0.0))
    assert [a.margin for a in cut] == pytest.approx([a.margin for a in whole], abs=1e-4)
    assert [a.margin for a in cut] != pytest.approx([a.margin for a in _ask(generator)], abs=1e-4)


def test_a_yes_offset_is_seen_in_full(generator: Generator) -> None:
    plain = [answer.margin or 0.0 for answer in _ask(generator)]
    shifted = [answer.margin for answer in _under(generator, "yes-offset(offset=1.5)")]
    assert shifted == pytest.approx([margin + 1.5 for margin in plain], abs=1e-4)


def test_watching_changes_nothing_and_leaves_nothing(generator: Generator) -> None:
    model = generator.model
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    prompts, images = _asked(generator)
    inputs, seen = generator.inputs(prompts, images), []
    with lmmhooks.wrap(model, "code", processor=generator.processor):
        bare = model.generate(**inputs, **generator._arguments(GREEDY))
        with watched_scores(model, lambda scores, uncut: seen.append(scores.shape)):
            watched = model.generate(**inputs, **generator._arguments(GREEDY))
    assert torch.equal(bare, watched)
    # The description that code asks for first, and its branch, run inside the forwards that are counted.
    assert len(seen) == watched.shape[1] - inputs["input_ids"].shape[1]
    assert {shape[0] for shape in seen} == {len(prompts)}
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
    with pytest.raises(RuntimeError, match="on purpose"), watched_scores(model, _fails):
        model.generate(**inputs, **generator._arguments(GREEDY))
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def _fails(scores: torch.Tensor, uncut: torch.Tensor) -> None:
    raise RuntimeError("on purpose")


class Tokenizer:
    """Ids by text."""

    def __init__(self, **ids: list[int]) -> None:
        self.ids = {name.replace("_", " "): value for name, value in ids.items()}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": self.ids[text]}


def test_spellings_with_and_without_a_space_are_one_word() -> None:
    assert word_tokens(Tokenizer(Yes=[1], _Yes=[2], No=[3], _No=[3]), WORDS) == ([1, 2], [3])
    assert word_tokens(Tokenizer(Yes=[1], _Yes=[9, 1], No=[3], _No=[9, 3]), WORDS) == ([1], [3])
    assert word_tokens(Tokenizer(Yes=[5, 6], _Yes=[9, 1], No=[7, 6], _No=[9, 3]), WORDS) == ([5], [7])
    with pytest.raises(TaskError, match="same token"):
        word_tokens(Tokenizer(Yes=[5, 6], _Yes=[9, 1], No=[5, 7], _No=[9, 3]), WORDS)
    other = AnswerWords("left", "right", lambda doc: True, lambda doc: "")
    assert word_tokens(Tokenizer(left=[1], _left=[2], right=[3], _right=[4]), other) == ([1, 2], [3, 4])


def test_what_cannot_be_said_keeps_its_sign() -> None:
    evidence = Evidence(3, ([0], [1]))
    scores = torch.tensor([[1.0, -math.inf, 0.0], [-math.inf, 2.0, 0.0], [-math.inf, -math.inf, 0.0]])
    evidence(scores, scores)
    assert evidence.margins() == [UNSAYABLE, -UNSAYABLE, None]
    assert evidence.gaps([1, 1, 1]) == [[1.0], [2.0], [UNSAYABLE]]
    assert Evidence(2, None).margins() == [None, None]


def test_the_cut_of_a_control_is_that_of_its_method() -> None:
    def cut(spec: str) -> float | None:
        return plausibility_cut([lmmhooks.methods.resolve(spec)])

    assert cut("vcd") == 0.1
    assert cut("sign-flip(of='agla(relevance=\"attention\")')") == 0.5
    assert cut("var") is None
    assert cut("yes-offset(offset=1.0)") is None
    assert cut("deco") is None, "its candidates are no cut of this kind"
