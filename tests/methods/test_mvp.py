"""Several views, several paths: totals against calls one at a time, and what the method makes of scripted replies."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.decoding.answering import Reply
from lmmhooks.methods.decoding.mvp import INSTRUCTIONS, Mvp, answer_place, certainties, normalised
from tests.reference.mvp import mvp

VOCABULARY = ["Yes", "No", "maybe", " yes", " no", " a", " cat", ".", "the", " dog"]


class Script:
    """Stands for the model: captions by view, first distributions by caption, replies by first token."""

    def __init__(self, first, paths):
        self.first, self.paths = first, paths
        self.memory = {}
        self.unspeakable = ()
        self.calls = []

    def __call__(self, image, prompts, *, max_new_tokens, starts=None, draw=None, **kwargs):
        self.calls.append((tuple(prompts), tuple(starts or ()), max_new_tokens, draw, kwargs))
        if starts is not None:
            return [self.paths[start] for start in starts]
        if max_new_tokens > 1:
            return [reply(f"view{INSTRUCTIONS.index(prompt)}") for prompt in prompts]
        views = [next(view for view in range(3) if f"view{view}" in prompt) for prompt in prompts]
        return [Reply((0,), ("",), torch.tensor([self.first[view]]).log()) for view in views]

    def digest(self, image):
        return repr(image).encode()

    def decode(self, token):
        return VOCABULARY[token].strip()


def reply(*pieces, certainty=0.5):
    """A reply whose every step has two tokens with this gap between them."""
    pair = torch.tensor([(1 + certainty) / 2, (1 - certainty) / 2])
    logits = torch.full((len(pieces), len(VOCABULARY)), -math.inf)
    logits[:, :2] = pair.log()
    return Reply(tuple(range(len(pieces))), pieces, logits)


#: yes and no among the first tokens, one path that says no, one that says nothing.
FIRST = [
    [0.4, 0.3, 0.2, 0.0125, 0.0125, 0.05, 0.0125, 0.0125, 0.0, 0.0],
    [0.1, 0.2, 0.6, 0.0125, 0.0125, 0.05, 0.0125, 0.0125, 0.0, 0.0],
    [0.12, 0.11, 0.05, 0.0125, 0.0125, 0.6, 0.07, 0.025, 0.0, 0.0],
]
PATHS = {2: reply(" well", " no", certainty=0.25), 5: reply(" cat")}


def test_paths_count_with_their_probability_times_certainty():
    script = Script(FIRST, PATHS)
    totals, _ = Mvp(temperature=0.0, topk=3).vote(script, "image", "Is there a CAT?")
    yes = 0.4 * 0.4 + 0.4 * 0.1 + 0.2 * 0.12
    no = 0.4 * (0.3 + 0.2 * 0.25) + 0.4 * (0.2 + 0.6 * 0.25) + 0.2 * 0.11
    assert totals == pytest.approx({"Yes": yes, "No": no}, abs=1e-6)
    biased, _ = Mvp(temperature=0.0, topk=3, unknown="yes").vote(Script(FIRST, PATHS), "image", "Is there a CAT?")
    assert biased == pytest.approx({"Yes": yes + 0.2 * 0.6, "No": no}, abs=1e-6)
    assert all(value >= 0 for value in totals.values())
    assert sum(totals.values()) <= 1
    assert "is there a cat?" in script.calls[1][0][0], "the question is asked in lower case"


def test_one_path_is_the_first_token_of_each_view():
    first = [FIRST[0], [0.2, 0.7, 0.1, 0, 0, 0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0, 0, 0, 0, 0]]
    totals, _ = Mvp(topk=1).vote(Script(first, {}), "image", "?")
    assert totals == pytest.approx({"Yes": 0.4 * 0.4 + 0.2 * 0.9, "No": 0.4 * 0.7}, abs=1e-6)


def test_a_view_of_weight_one_is_that_view_and_others_are_not_asked():
    script = Script(FIRST, PATHS)
    totals, _ = Mvp(weights=(0, 1, 0), topk=3).vote(script, "image", "?")
    assert totals["Yes"] == pytest.approx(0.1, abs=1e-6)
    assert [len(call[0]) for call in script.calls] == [1, 1, 1]


def test_captions_are_made_once_per_image_and_paths_of_all_views_asked_together():
    script = Script(FIRST, PATHS)
    method = Mvp(topk=3)
    method.answer(script, "one", "?")
    assert [len(call[0]) for call in script.calls] == [3, 3, 3]
    assert script.calls[2][1] == (2, 2, 5)
    method.answer(script, "one", "other?")
    assert len(script.calls) == 5
    method.answer(script, "two", "?")
    assert len(script.calls) == 8


def test_improbable_paths_are_left_alone_and_equal_totals_are_no():
    script = Script([FIRST[0]] * 3, PATHS)
    Mvp(topk=3, threshold=0.5).vote(script, "image", "?")
    assert len(script.calls) == 2, "no path reaches the threshold"
    even = [[0.5, 0.5] + [0.0] * 8] * 3
    assert Mvp(topk=2).answer(Script(even, {}), "image", "?") == "No"


def test_open_answers_are_grouped_by_their_text():
    first = [[0, 0, 0, 0, 0, 0.3, 0, 0, 0.6, 0.1]] * 3
    paths = {
        5: reply(" dog", ".", certainty=0.9),
        8: reply(" cat", certainty=0.3),
        9: reply(".", certainty=0.5),
    }
    method = Mvp(topk=3, temperature=0.0, answers=None)
    totals, wordings = method.vote(Script(first, paths), "image", "What is it?")
    assert totals == pytest.approx({"cat": 0.6 * 0.3, "dog": 0.3 * 0.9 + 0.1 * 0.5}, abs=1e-6)
    assert wordings == {"cat": "the cat", "dog": "a dog."}
    assert method.answer(Script(first, paths), "image", "What is it?") == "a dog."


def test_places_gaps_and_normal_forms():
    assert answer_place([" I", " say", " n", "o", " yes"], ("Yes", "No")) == ("No", 2)
    assert answer_place(["yes,", " Not", " nobody"], ("Yes", "No")) is None
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    sharp = (logits / 0.5).softmax(-1)[0]
    assert certainties(logits, 0.5) == pytest.approx([float(sharp[0] - sharp[1]), 0.0])
    assert normalised(" The RED cube, a  ball. ") == "red cube ball"


@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 0},
        {"threshold": 1.5},
        {"weights": (1, 0)},
        {"weights": (0, 0, 0)},
        {"weights": (-1, 1, 1)},
        {"temperature": -1},
        {"caption_top_p": 0},
        {"caption_tokens": 0},
        {"path_tokens": 0},
        {"unknown": "no"},
        {"unknown": "yes", "answers": ("red", "blue")},
        {"answers": ("Yes",)},
        {"instructions": "one"},
        {"template": "{question}"},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        Mvp(**settings)


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def loaded(request):
    return lmmhooks.load(request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 255, (112, 112, 3), generator=generator, dtype=torch.uint8).numpy())


SHORT = {"caption_tokens": 6, "path_tokens": 4}


def test_totals_are_those_of_calls_one_at_a_time(loaded, image):
    model, processor = loaded
    template = "{caption} {question}"
    method = Mvp(temperature=0.0, topk=4, threshold=0.0, template=template, **SHORT)
    with lmmhooks.wrap(model, method, processor=processor) as patch:
        seen = {}
        real = Mvp.vote

        def vote(self, *args, **kwargs):
            seen["totals"], wordings = real(self, *args, **kwargs)
            return seen["totals"], wordings

        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(Mvp, "vote", vote)
            text = patch.answer(image, "Is there a red circle?")
    expected = mvp(
        model,
        processor,
        image,
        "Is there a red circle?",
        instructions=INSTRUCTIONS,
        template=template,
        weights=method.weights,
        topk=4,
        threshold=0.0,
        **SHORT,
    )
    # Batches pad their rows, which changes the order of summation.
    assert seen["totals"] == pytest.approx(expected, abs=1e-4)
    assert sum(expected.values()) > 0
    assert text == max(("No", "Yes"), key=lambda word: expected[word])


def test_replies_do_not_depend_on_what_is_asked_beside_them(loaded, image):
    model, processor = loaded
    drawn = {}
    with lmmhooks.wrap(model, Mvp(**SHORT), processor=processor) as patch:
        engine = patch._runtime.answering
        patch.answer(image, "Is there a circle?")
        drawn["all"] = next(iter(engine.memory.values()))
    with lmmhooks.wrap(model, Mvp(weights=(0, 0, 1), **SHORT), processor=processor) as patch:
        torch.manual_seed(5)
        patch.answer(image, "Is there a circle?")
        drawn["one"] = next(iter(patch._runtime.answering.memory.values()))
    with lmmhooks.wrap(model, Mvp(seed=1, **SHORT), processor=processor) as patch:
        patch.answer(image, "Is there a circle?")
        drawn["other"] = next(iter(patch._runtime.answering.memory.values()))
    assert drawn["all"][2] == drawn["one"][2]
    assert drawn["all"] != drawn["other"]


def test_it_answers_under_other_methods_and_generate_is_refused(loaded, image):
    model, processor = loaded
    before = sorted(vars(model))
    plain = lmmhooks.wrap(model, "decoding-identity", processor=processor).answer(image, "What?", max_new_tokens=3)
    lmmhooks.unwrap(model)
    with lmmhooks.wrap(model, "fastervlm(keep=16)", "vcd", Mvp(**SHORT), processor=processor) as patch:
        assert patch.answer(image, "Is there a circle?", max_new_tokens=3) in ("Yes", "No")
        with pytest.raises(PromptError, match=r"call patch\.answer"):
            model.generate(input_ids=torch.tensor([[1, 2]]))
        with patch.disabled():
            assert patch.answer(image, "What?", max_new_tokens=3) == plain
    assert sorted(vars(model)) == before
    with lmmhooks.wrap(model, Mvp(**SHORT), processor=processor) as patch:
        text = patch.answer(None, "Hello?", max_new_tokens=2)
    with lmmhooks.wrap(model, "decoding-identity", processor=processor) as patch:
        assert patch.answer(None, "Hello?", max_new_tokens=2) == text
    with pytest.raises(MethodError, match="beam search"):
        lmmhooks.wrap(model, "opera", "mvp")


def test_every_setting_survives_being_written_down():
    method = dataclasses.replace(Mvp(), weights=(1, 0, 0), answers=None)
    assert lmmhooks.methods.resolve(method.spec()) == method
