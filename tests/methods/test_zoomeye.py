"""ZoomEye: trees, boxes and searches against a rendering by tables, confidences against full forwards."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.refinement import zoom_prompts, zooming
from lmmhooks.methods.refinement.searching import find_all, find_one, trust
from lmmhooks.methods.refinement.zoom_prompts import EXAMPLES, NAMED, NAMING, cues_in
from lmmhooks.methods.refinement.zoomeye import ZoomEye, confidence
from lmmhooks.methods.refinement.zooming import far_apart, local_view, merged, padded, patch_box, tree, union
from lmmhooks.methods.words import has_pronoun, question_phrases
from lmmhooks.prompting import Prompter, answer
from tests.methods.looked import models, picture  # noqa: F401 # fixtures
from tests.reference import zoomeye as naive

SIZES = [(900, 700), (900, 4000), (3000, 700), (336, 336), (200, 150), (1343, 1345)]


def breadth_first(root):
    nodes = [root]
    for node in nodes:
        nodes.extend(node.children)
    return nodes


# -- trees and boxes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_trees_are_those_of_the_table(size):
    found = breadth_first(tree((0, 0, *size), 336))
    expected = naive.nodes_of(*size, 336)
    assert [(node.box, node.depth) for node in found] == [(node["box"], node["depth"]) for node in expected]
    assert found[0].max_depth == max(node["depth"] for node in expected)


@pytest.mark.parametrize("split", [4, 9, 16])
@pytest.mark.parametrize("size", SIZES)
def test_children_tile_their_parent(size, split):
    for node in tree((0, 0, *size), 300, split):
        if not node.children:
            assert max(node.box[2:]) < 300
            continue
        assert len(node.children) in (split, 8)
        covered = np.zeros((node.box[3], node.box[2]), dtype=int)
        for child in node.children:
            left, top = child.box[0] - node.box[0], child.box[1] - node.box[1]
            covered[top : top + child.box[3], left : left + child.box[2]] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize("scale", [1.0, 1.2])
@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_by_hand_and_inside(size, scale):
    for node in tree((0, 0, *size), 200):
        found = patch_box(node.box, size, 200, scale)
        assert found == naive.patch(node.box, *size, 200, scale)
        assert 0 <= found[0] < found[2] <= size[0]
        assert 0 <= found[1] < found[3] <= size[1]


def test_boxes_that_come_within_a_hundred_pixels_become_one():
    assert merged([(0, 0, 100, 100), (199, 0, 300, 100)]) == [(0, 0, 300, 100)]
    assert merged([(0, 0, 100, 100), (200, 0, 300, 100)]) == [(0, 0, 100, 100), (200, 0, 300, 100)]
    # The middle one bridges the others, in whatever order they come.
    bridged = [(0, 0, 10, 10), (150, 0, 160, 10), (75, 0, 85, 10)]
    for order in itertools.permutations(bridged):
        assert merged(order) == [(0, 0, 160, 10)]
    assert merged([]) == []
    assert union([(5, 1, 6, 9), (2, 3, 4, 12)]) == (2, 1, 6, 12)


def test_padding_and_views():
    image = Image.new("RGB", (100, 60), "white")
    square, left, top = padded(image, (1, 2, 3))
    assert (square.size, left, top) == ((100, 100), 0, 20)
    assert square.getpixel((0, 0)) == (1, 2, 3)
    assert square.getpixel((0, 20)) == (255, 255, 255)
    # Boxes are in the image, views are cut from the square.
    view = local_view(image, [(0, 0, 10, 60)], 50, (1, 2, 3))
    assert view.size == (10, 60)
    assert view.getextrema() == ((255, 255),) * 3
    main, zoomed = zooming.main_and_zoomed(
        Image.new("RGB", (240, 120)), [(100, 40, 140, 80)], 60, "red", (9, 9, 9), keep_aspect=False
    )
    # Lines of 240 // 120 pixels lie around the box, and are part of the zoomed view.
    assert (main.size, zoomed.size) == ((60, 60), (44, 44))
    assert zoomed.getpixel((0, 0)) == zoomed.getpixel((1, 1)) == (255, 0, 0)
    assert zoomed.getpixel((22, 22)) == (0, 0, 0)


def test_two_boxes_far_apart_stand_side_by_side_by_their_order_in_the_image():
    image = Image.new("RGB", (3000, 2000), "white")
    image.paste((255, 0, 0), (0, 0, 100, 100))
    image.paste((0, 0, 255), (2500, 120, 2600, 220))
    boxes = [(2500, 120, 2600, 220), (0, 0, 100, 100)]
    view = local_view(image, boxes, 80, (7, 7, 7))
    assert view.size == (160, 160)
    # Centres are 120 apart, more than the side: the left one half a side higher, the right one half a side lower.
    assert view.getpixel((40, 1)) == (255, 0, 0)
    assert view.getpixel((120, 159)) == (0, 0, 255)
    assert view.getpixel((40, 159)) == (7, 7, 7)
    assert far_apart(image, *boxes[::-1], 80, (7, 7, 7)).tobytes() == far_apart(image, *boxes, 80, (7, 7, 7)).tobytes()
    near = local_view(image, [(0, 0, 100, 100), (300, 0, 400, 100)], 80, (7, 7, 7))
    assert near.size == (400, 100)


# -- searches ---------------------------------------------------------------------------------------------------------


def test_weights_run_from_the_bias_to_one():
    assert trust(0, 4, 0.2) == 0.2
    assert trust(4, 4, 0.2) == 1.0
    assert trust(2, 4, 0.6) == pytest.approx(0.6 + 0.4 / 4)


@pytest.mark.parametrize("case", range(40))
def test_searches_are_those_of_the_table(case):
    generator = np.random.default_rng(case)
    size = SIZES[case % len(SIZES)]
    table = naive.nodes_of(*size, 250)
    # Few different values, so that there are ties.
    says = {kind: generator.integers(-4, 4, len(table)) / 4 for kind in ("existence", "latent", "answering")}
    if case % 3:
        says["answering"] -= 0.6
    settings = {"bias": [0.2, 0.6][case % 2], "floor": 0.0}
    falls = [0.1, 0.1, 0.2]
    flags = (bool(case & 1), bool(case & 2))
    root = tree((0, 0, *size), 250)
    numbers = {node: number for number, node in enumerate(breadth_first(root))}
    looked = []

    def ask(node, kind):
        if kind == "answering":
            looked.append(numbers[node])
        return float(says[kind][numbers[node]])

    deepest = min(root.max_depth, 5)
    found, looks = find_one(
        root,
        ask,
        deepest=deepest,
        threshold=0.6,
        decrements=falls,
        pops=3 * deepest,
        to_bottom=flags[0],
        skip_root=flags[1],
        **settings,
    )
    expected, order = naive.search(
        table,
        lambda number, kind: float(says[kind][number]),
        tau=0.6,
        falls=falls,
        to_bottom=flags[0],
        no_root=flags[1],
        **settings,
    )
    assert [numbers[node] for node in found] == expected
    assert looked == (order[1:] if flags[1] else order)
    assert looks == len(order)


def test_confidences_are_asked_for_once_and_the_first_view_that_will_do_ends_the_search():
    asked = []
    root = tree((0, 0, 1000, 1000), 300)
    good = root.children[2].children[1]

    def ask(node, kind):
        asked.append((node, kind))
        path = node in (root.children[2], good)
        return {"existence": 0.5 * path, "latent": 0.1, "answering": 0.9 if node is good else 0.0}[kind]

    found, looks = find_one(
        root, ask, deepest=2, bias=0.2, threshold=0.6, floor=0, decrements=(0.1,), pops=6
    )  # fmt: skip
    assert (found, looks) == ([good], 3)
    assert len(asked) == len(set(asked))


def test_all_views_of_a_thing_that_are_better_than_their_parts():
    root = tree((0, 0, 1000, 1000), 300)
    part = root.children[0]
    values = {root: 0.65, part: 0.7, part.children[0]: 0.7, part.children[1]: 0.59, root.children[3]: 0.9}
    visited = []

    def ask(node, kind):
        assert kind == "existence"
        visited.append(node)
        return values.get(node, -1.0)

    # As good as its parts is good enough, hence the parent beside the child; the root is worse than two of its parts.
    assert find_all(root, ask, threshold=0.6, depth=2) == [part.children[0], part, root.children[3]]
    assert max(node.depth for node in visited) == 2
    assert len(visited) == len(set(visited)) == 21


def test_confidence_changes_its_sign_with_the_words():
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    assert confidence(logits, 3, 5) == -confidence(logits, 5, 3)
    assert confidence(logits, 3, 5) == pytest.approx(2 * (float(logits[[3, 5]].softmax(0)[0]) - 0.5), abs=1e-6)


# -- things -----------------------------------------------------------------------------------------------------------


def test_things_are_read_off_the_reply():
    assert cues_in(f"Well. {NAMED}white car, tree and all birds.") == ["white car", "tree", "all birds"]
    assert cues_in("I do not know.") == []
    for _, reply in EXAMPLES:
        assert cues_in(reply)


def test_pronouns_and_phrases():
    assert has_pronoun("his bag", tagged=False)
    assert not has_pronoun("bag of the man", tagged=False)
    assert question_phrases("What color is the small red circle left of the tree? Answer briefly.") == [
        "small red circle",
        "tree",
    ]
    assert question_phrases("What is this?") == []


# -- on models --------------------------------------------------------------------------------------------------------

QUESTION = "Is there a red car near the tree?"
SIDE = 112


def listened(monkeypatch, model, processor, spec, image, prompt=QUESTION, **kwargs):
    """Answer, pictures of the answer, and every confidence: (pictures, prompt, value)."""
    heard = []
    original = ZoomEye._certainty

    def certainty(self, look, template, thing, shown):
        value = original(self, look, template, thing, shown)
        heard.append((shown, template.format(thing), value))
        return value

    with lmmhooks.wrap(model, spec, processor=processor) as patch, monkeypatch.context() as context:
        context.setattr(ZoomEye, "_certainty", certainty)
        text = patch.answer(image, prompt, **{"max_new_tokens": 3, **kwargs})
        return text, list(patch._runtime.answering.looked_at), heard


def written(name, text, before, count):
    """The prompt as the templates of the bundled models write it, by hand."""
    parts = [text] if count == 1 else [before[0], before[1] + text]
    if name == "tiny-llava":
        return "USER: " + "".join(f"<image>\n{part}" for part in parts) + " ASSISTANT:"
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    body = "".join(mark + part for part in parts)
    return f"{system}<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("view", ["local", "global"])
def test_confidences_are_those_of_full_forwards(models, picture, monkeypatch, view):  # noqa: F811
    model, eager, processor = models
    name = "tiny-llava" if model.config.model_type == "llava" else "tiny-qwen"
    spec = ZoomEye(side=SIDE, cues="question", view=view, words=("Yes", "No"), threshold=0.6, max_depth=1)
    text, shown, heard = listened(monkeypatch, model, processor, spec, picture)
    before = (zoom_prompts.MAIN_IMAGE.format("red"), zoom_prompts.ZOOMED_IMAGE)
    assert len(heard) > 4
    for pictures, prompt, value in heard:
        images = [picture] if pictures is None else pictures
        expected = naive.yes(eager, processor, images, written(name, prompt, before, len(images)), ("Yes", "No"))
        # Float32 forwards, of which one begins in the middle of the prompt.
        assert value == pytest.approx(expected, abs=1e-4)
    kinds = {prompt.split("?")[0][:20] for _, prompt, _ in heard}
    assert len(kinds) >= 3, "all three prompts were asked"
    if view == "global":
        assert any(pictures is not None and len(pictures) == 2 for pictures, _, _ in heard)
    inputs = processor(images=shown, text=[written(name, QUESTION, before, len(shown))], return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert text == processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def test_global_views_are_those_by_hand(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    spec = f"zoomeye(side={SIDE}, cues='question', view='global', overview='shrunk', max_depth=1)"
    _, _, heard = listened(monkeypatch, model, processor, spec, picture, "Is there a car?")
    color = tuple(int(value * 255) for value in processor.image_processor.image_mean)
    boxes = [node["box"] for node in naive.nodes_of(*picture.size, SIDE)]
    expected = {
        tuple(image.tobytes() for image in naive.global_views(picture, patch, SIDE, color))
        for patch in (naive.patch(box, *picture.size, SIDE, 1.2) for box in boxes)
    }
    views = {tuple(image.tobytes() for image in pictures) for pictures, _, _ in heard if pictures is not None}
    assert views
    assert views <= expected


def test_things_are_asked_for_with_examples_and_without_the_image(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    turns = [part for question, reply in EXAMPLES for part in (NAMING.format(question), reply)]
    told = []
    with lmmhooks.wrap(model, "zoomeye", processor=processor) as patch:
        looker = type(patch._runtime.answering.asker(Prompter(processor), picture, QUESTION, {}))
        original = looker._inputs

        def inputs(self, images, prompt, *rest):
            found = original(self, images, prompt, *rest)
            told.append((len(images), processor.tokenizer.decode(found["input_ids"][0])))
            return found

        with monkeypatch.context() as context:
            context.setattr(looker, "_inputs", inputs)
            text = patch.answer(picture, QUESTION, max_new_tokens=3)
        shown = patch._runtime.answering.looked_at
    assert told[0][0] == 0
    at = -1
    for part in [*turns, NAMING.format(QUESTION)]:
        at = told[0][1].index(part, at + 1)
    # A model of this size names nothing that was shown; the image is answered as a whole.
    assert text == answer(model, processor, shown, QUESTION, max_new_tokens=3)


def test_several_things_lead_to_the_bottom_and_are_shown_together(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    method = ZoomEye(side=SIDE, view="local", threshold=-1.0, floor=-1.0)
    monkeypatch.setattr(ZoomEye, "_cues", lambda self, look: ["red car", "tree"])
    asked = []
    original = ZoomEye._confidence

    def certain(self, look, cue, question, node, kind):
        asked.append((cue, question, node.depth, kind))
        return original(self, look, cue, question, node, kind)

    monkeypatch.setattr(ZoomEye, "_confidence", certain)
    with lmmhooks.wrap(model, method, processor=processor) as patch:
        patch.answer(picture, QUESTION, max_new_tokens=2)
        [shown] = patch._runtime.answering.looked_at
    answering = [(cue, question, depth) for cue, question, depth, kind in asked if kind == "answering"]
    assert {question for _, question, _ in answering} == {
        "What is the appearance of the red car?",
        "What is the appearance of the tree?",
    }
    assert min(depth for *_, depth in answering) == 1, "the whole image is no candidate"
    # Every view will do, yet the search goes on to a leaf.
    assert max(depth for *_, depth in answering) == tree((0, 0, *picture.size), SIDE).max_depth
    assert shown.width == shown.height < max(picture.size)


def test_a_thing_seen_from_afar_ends_global_searches_of_several(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    monkeypatch.setattr(ZoomEye, "_cues", lambda self, look: ["red car", "all trees"])
    sure = ZoomEye(side=SIDE, view="global", threshold=-1.0, floor=-1.0)
    text, shown, heard = listened(monkeypatch, model, processor, sure, picture)
    assert [image.size for image in shown] == [picture.size]
    assert text == answer(model, processor, picture, QUESTION, max_new_tokens=3)
    [(pictures, prompt, _)] = heard
    assert max(pictures[0].size) == SIDE
    assert "What is the appearance of the red car?" in prompt


def test_all_of_a_thing_is_searched_without_its_plural(monkeypatch):
    method = ZoomEye(side=60, view="local", threshold=0.6, floor=0.0, decrements=(0.1,), bias=0.2, scale=1.0)
    monkeypatch.setattr(ZoomEye, "_cues", lambda self, look: ["all birds"])
    asked = set()

    def certain(self, look, cue, question, node, kind):
        asked.add((cue, kind))
        return 0.9 if node.depth == 1 and node.box[0] else 0.0

    monkeypatch.setattr(ZoomEye, "_confidence", certain)
    look = SimpleNamespace(image=Image.new("RGB", (100, 100)), prompt="How many birds?")
    found = method.search(look)
    assert asked == {("bird", "existence")}
    assert [node.box for node in found] == [(50, 0, 50, 50), (50, 50, 50, 50)]


def test_a_red_rectangle_in_the_question_is_marked_in_blue():
    look = SimpleNamespace(
        image=Image.new("RGB", (240, 240)), prompt="What is in the red rectangle?", mean_color=(0, 0, 0)
    )
    method = ZoomEye(view="global", side=56, scale=1.2, overview="square")
    _, zoomed = method.views(look, [tree((0, 0, 240, 240), 56).children[0]])
    assert zoomed.getpixel((0, 0)) == (0, 0, 255)
    assert "blue rectangle" in method._about(look, [zoomed, zoomed], "?")[0]


def test_published_settings_by_family(models):  # noqa: F811
    model, _, processor = models
    with lmmhooks.wrap(model, "zoomeye(threshold=0.5)", processor=processor) as patch:
        [method] = patch.methods
    if model.config.model_type == "llava":
        assert (method.view, method.bias, method.scale, method.side) == ("local", 0.2, 1.0, 112)
        assert method.decrements == (0.1, 0.1, 0.2)
    else:
        assert (method.view, method.overview, method.bias, method.scale) == ("global", "shrunk", 0.6, 1.2)
        assert (method.side, method.decrements) == (448, (0.05, 0.1, 0.2))
    assert (method.threshold, method.floor, method.pronouns) == (0.5, 0.0, method.pronouns)
    assert lmmhooks.method("zoomeye", **method.settings()).spec() == method.spec()


@pytest.mark.parametrize("size", [(90, 400), (20, 10), (400, 45)])
def test_images_of_extreme_shape(models, size, monkeypatch):  # noqa: F811
    model, _, processor = models
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for view in ("local", "global"):
        spec = f"zoomeye(side={SIDE}, cues='question', view='{view}', max_depth=1)"
        text, shown, _ = listened(monkeypatch, model, processor, spec, image, "Is there a car?")
        assert isinstance(text, str)
        assert all(min(view.size) >= 1 for view in shown)


def test_words_of_several_tokens_no_image_and_several_images(models, picture):  # noqa: F811
    model, _, processor = models
    with lmmhooks.wrap(model, f"zoomeye(side={SIDE}, cues='question', words=('Qxq', 'No'))", processor=processor) as p:
        with pytest.raises(PromptError, match="tokens of this model"):
            p.answer(picture, "Is there a car?", max_new_tokens=2)
        with pytest.raises(PromptError, match="one image"):
            p.answer([picture, picture], "Is there a car?", max_new_tokens=2)
        text = p.answer(None, "Is there a car?", max_new_tokens=2)
    assert text == answer(model, processor, None, "Is there a car?", max_new_tokens=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 1.5},
        {"floor": 0.7, "threshold": 0.5},
        {"decrements": ()},
        {"decrements": (0.1, 0.0)},
        {"bias": 1.2},
        {"view": "both"},
        {"overview": "round"},
        {"scale": 0.5},
        {"side": 4},
        {"split": 5},
        {"max_depth": 0},
        {"pops_per_level": 0},
        {"all_threshold": 2},
        {"all_depth": -1},
        {"cues": "nobody"},
        {"examples": (("one",),)},
        {"pronouns": "guess"},
        {"words": ("Yes", "Yes")},
        {"decomposed": "What?"},
        {"existence": "Is there?"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        ZoomEye(**settings)


def test_searches_need_no_more_than_their_arguments():
    # A tree of one node: nothing is opened, and no weight is computed.
    root = tree((0, 0, 100, 100), 336)
    ask = partial(lambda value, node, kind: value, 0.3)
    assert find_one(root, ask, deepest=0, bias=0.2, threshold=0.6, floor=0, decrements=(0.1,), pops=0) == ([], 1)
    assert find_one(root, ask, deepest=0, bias=0.2, threshold=0.6, floor=0, decrements=(0.4,), pops=0) == ([root], 1)
