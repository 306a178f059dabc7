"""
ZoomEye: open the parts of an image that are worth a closer look, led by the model's own yes and no.

The model names the things a question is about. For each, views of the image are opened best first: priority is how
likely the thing is in the view, or to be found by zooming in, and the search ends at a view from which the question
can be answered. The answer is given from what was found.

The examples that show the model how to name things are ours and about no benchmark; the released ones are made for the
benchmark that they are used on. Multiple choice by the loss of options is left to the harness. Views of the four parts
of a node are read one after the other. How many tiles each of two pictures is cut into is up to the model's processor;
the authors cut the zoomed one alone, and LLaVA-OneVision's processor neither of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.answering import Ask
from lmmhooks.methods.refinement.base import Look, RefinementMethod
from lmmhooks.methods.refinement.searching import find_all, find_one
from lmmhooks.methods.refinement.zoom_prompts import (
    ANSWERING,
    EXAMPLES,
    LOCAL,
    MAIN_IMAGE,
    NAMED,
    NAMING,
    WHOLE,
    ZOOMED,
    ZOOMED_IMAGE,
    cues_in,
)
from lmmhooks.methods.refinement.zooming import (
    SPLITS,
    Node,
    local_view,
    main_and_zoomed,
    merged,
    padded,
    patch_box,
    shrunk,
    tree,
)
from lmmhooks.methods.words import has_pronoun, question_phrases, tagger_installed

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["ZoomEye", "confidence"]

#: Longest reply that names things, in tokens.
LONGEST = 256
#: By model type, where they differ from those of both LLaVA models.
PUBLISHED: dict[str, dict[str, Any]] = {
    "internvl": {"threshold": 0.2, "floor": -0.2},
    "qwen2_5_vl": {"threshold": 0.95, "decrements": (0.05, 0.1, 0.2)},
}
#: Longer side of views where the encoder takes images of any size (the authors' choice for Qwen2.5-VL).
ANY_SIZE = 448


def confidence(logits: Tensor, yes: int, no: int) -> float:
    """``2 p - 1`` with p the probability of yes among yes and no; ``logits [vocabulary]``, ids of the two words."""
    return math.tanh((float(logits[yes]) - float(logits[no])) / 2)


@dataclass(frozen=True)
class ZoomEye(RefinementMethod):
    """Search a tree of zoomed views for what a question is about, and answer from what was found."""

    id: ClassVar[str] = "zoomeye"
    paper: ClassVar[str] = "ZoomEye: Human-Like Zooming through Tree-Based Image Exploration, EMNLP 2025, 2411.16044"
    code: ClassVar[str] = "https://github.com/om-ai-lab/ZoomEye"

    threshold: float | None = setting(
        None, help="Answering confidence that ends a search, in [-1, 1]. None: 0.6; InternVL 0.2, Qwen2.5-VL 0.95."
    )
    floor: float | None = setting(
        None, help="A search gives up below it, in [-1, 1], at most the threshold. None: 0; InternVL -0.2."
    )
    decrements: tuple[float, ...] | None = setting(
        None, help="Taken from the threshold one after the other, above 0; the last repeats. None: 0.1, 0.1, 0.2."
    )
    bias: float | None = setting(
        None, help="Weight of existence against latent confidence at the root, in [0, 1]. None: 0.2 local, else 0.6."
    )
    view: str | None = setting(
        None,
        help="'local': the part alone; 'global': the image with the part marked, and the part. None: local on models "
        "that see any image as one crop of fixed size.",
    )
    overview: str | None = setting(
        None,
        help="First picture of a global view: 'square', padded, or 'shrunk', its longer side at `side` (the authors' "
        "for Qwen2.5-VL). None: square on models that cut images into tiles.",
    )
    scale: float | None = setting(None, help="Of a view around its part, 1 or more. None: 1 local, else 1.2.")
    side: int | None = setting(
        None,
        help="Parts with smaller sides are not divided, pixels, 8 or more. None: input side of the encoder, or 448.",
    )
    split: int = setting(4, help="Parts of a view: 4, 9 or 16.")
    max_depth: int = setting(5, help="Of the tree, 1 or more.")
    pops_per_level: int = setting(
        3, help="Views looked at per level of the tree before the threshold falls, 1 or more."
    )
    all_threshold: float = setting(0.6, help="Existence confidence of views of 'all ...', in [-1, 1].")
    all_depth: int = setting(2, help="Deepest views that are searched for 'all ...', 0 or more.")
    cues: str = setting(
        "model",
        help="Who names the things a question is about: the 'model', shown `examples`, or 'question', for models that "
        "do not follow examples: runs of the question's content words (ours, UNVERIFIED).",
    )
    examples: tuple[tuple[str, str], ...] = setting(
        EXAMPLES, help=f"Questions and replies that show how, replies ending in '{NAMED}a and b'; ours, UNVERIFIED."
    )
    pronouns: str | None = setting(
        None, help="How cues with a pronoun are told, and left out: 'tagged' by spaCy or 'list'. None: spaCy if there."
    )
    decomposed: str = setting(
        "What is the appearance of the {}?", help="What a view must answer about each of several things, with {}."
    )
    existence: str | None = setting(None, help="Prompt of existence confidence, with {}. None: that of the authors.")
    latent: str | None = setting(None, help="Prompt of latent confidence, with {}. None: that of the authors.")
    answering: str | None = setting(None, help="Prompt of answering confidence, with {}. None: that of the authors.")
    words: tuple[str, str] = setting(("Yes", "No"), help="The two answers, one token each.")

    def __post_init__(self) -> None:
        for name in ("decrements", "examples", "words"):
            value: Any = getattr(self, name)
            self._require(not isinstance(value, str), name, "a list")
            object.__setattr__(self, name, value if value is None else tuple(value))
        pairs = [() if isinstance(pair, str) else tuple(pair) for pair in self.examples]
        self._require(all(len(pair) == 2 for pair in pairs), "examples", "pairs of a question and a reply")
        object.__setattr__(self, "examples", tuple(pairs))
        for name in ("threshold", "floor", "all_threshold"):
            self._require(getattr(self, name) is None or -1 <= getattr(self, name) <= 1, name, "in [-1, 1]")
        ordered = self.threshold is None or self.floor is None or self.floor <= self.threshold
        self._require(ordered, "floor", "at most the threshold")
        # Otherwise a search would never give up.
        falls = self.decrements is None or (len(self.decrements) > 0 and min(self.decrements) > 0)
        self._require(falls, "decrements", "numbers above 0")
        self._require(self.bias is None or 0 <= self.bias <= 1, "bias", "in [0, 1]")
        self._require(self.view in (None, "local", "global"), "view", "'local' or 'global'")
        self._require(self.overview in (None, "square", "shrunk"), "overview", "'square' or 'shrunk'")
        self._require(self.scale is None or self.scale >= 1, "scale", "1 or more")
        self._require(self.side is None or self.side >= 8, "side", "8 or more")
        self._require(self.split in SPLITS, "split", "4, 9 or 16")
        self._require(self.max_depth >= 1, "max_depth", "1 or more")
        self._require(self.pops_per_level >= 1, "pops_per_level", "1 or more")
        self._require(self.all_depth >= 0, "all_depth", "0 or more")
        self._require(self.cues in ("model", "question"), "cues", "'model' or 'question'")
        self._require(self.pronouns in (None, "list", "tagged"), "pronouns", "'list' or 'tagged'")
        self._require(len(self.words) == 2 and self.words[0] != self.words[1], "words", "two different words")
        for name in ("decomposed", "existence", "latent", "answering"):
            self._require(getattr(self, name) is None or "{}" in getattr(self, name), name, "a text with {}")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        usual = {"threshold": 0.6, "floor": 0.0, "decrements": (0.1, 0.1, 0.2)}
        return {**usual, **PUBLISHED.get(family.name, {})}

    def bind(self, family: Any) -> ZoomEye:
        sides = getattr(family.vision.config, "image_size", None) or ANY_SIZE
        view = self.view or ("global" if family.tokens_per_image is None else "local")
        local = view == "local"
        values: dict[str, Any] = {
            "view": view,
            "overview": self.overview or ("square" if family.has_tiles else "shrunk"),
            "bias": (0.2 if local else 0.6) if self.bias is None else self.bias,
            "scale": (1.0 if local else 1.2) if self.scale is None else self.scale,
            "side": self.side or (max(sides) if isinstance(sides, (list, tuple)) else int(sides)),
            "pronouns": self.pronouns or ("tagged" if tagger_installed() else "list"),
        }
        return replace(self, **values)

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """The answer from the views in which the things were found, or from the image."""
        look: Look = ask  # type: ignore[assignment] # what the engine gives to methods of this kind
        shown = self.views(look, self.search(look))
        return look.tell(self._about(look, shown, prompt), shown, **generate_kwargs).text

    def search(self, look: Look) -> list[Node]:
        """Parts of the image in which the things a question is about were found; empty where the image will do."""
        cues = self._cues(look)
        root = tree((0, 0, *look.image.size), self.side or ANY_SIZE, self.split)
        if self.view == "global" and len(cues) > 1 and self._will_do(look, cues):
            return []
        alone = len(cues) == 1 and not cues[0].startswith("all ")
        deepest = min(root.max_depth, self.max_depth)
        limits = {name: getattr(self, name) for name in ("threshold", "floor", "decrements", "bias")}
        found: list[Node] = []
        for cue in cues:
            if cue.startswith("all "):
                ask = partial(self._confidence, look, cue.removeprefix("all ").removesuffix("s"), "")
                found += find_all(root, ask, threshold=self.all_threshold, depth=self.all_depth)
                continue
            candidates, _ = find_one(
                root,
                partial(self._confidence, look, cue, look.prompt if alone else self.decomposed.format(cue)),
                deepest=deepest,
                pops=self.pops_per_level * deepest,
                to_bottom=not alone,
                skip_root=self.view == "local" and not alone,
                **limits,
            )
            if candidates:
                found.append(max(candidates, key=lambda node: node.depth))
        return found

    def views(self, look: Look, nodes: Sequence[Node]) -> list[Image] | None:
        """
        Pictures that show parts of the image.

        Returns
        -------
        list of Image or None
            None: the image as it is; one: a local view; two: the image with the parts marked, and the parts. Local
            views are padded to squares, as LLaVA's own processor does, lest a processor cuts their sides off.
        """
        image, color, side = look.image, look.mean_color, self.side or ANY_SIZE
        boxes = merged([patch_box(node.box, image.size, side, self.scale or 1.0) for node in nodes])
        if self.view == "global":
            if not all(node.depth for node in nodes) or not nodes:
                return None
            marked = "blue" if "red rectangle" in look.prompt else "red"
            return main_and_zoomed(image, boxes, side, marked, color, keep_aspect=self.overview == "shrunk")
        if not nodes or (len(nodes) == 1 and not nodes[0].depth):
            return [padded(image, color)[0].resize((side, side))]
        return [padded(local_view(image, boxes, side, color), color)[0]]

    def _cues(self, look: Look) -> list[str]:
        """The things the question is about, without those that are named by a pronoun."""
        if self.cues == "question":
            return question_phrases(look.prompt)
        asked = [(NAMING.format(question), reply) for question, reply in self.examples]
        reply = look.tell(NAMING.format(look.prompt), [], turns=asked, max_new_tokens=LONGEST, do_sample=False)
        return [cue for cue in cues_in(reply.text) if not has_pronoun(cue, tagged=self.pronouns == "tagged")]

    def _will_do(self, look: Look, cues: Sequence[str]) -> bool:
        """Whether some thing can be told from the whole image, small as the encoder's input."""
        side, enough = self.side or ANY_SIZE, self.threshold or 0.0
        small = shrunk(look.image, side)
        if self.overview == "square":
            small = padded(look.image, look.mean_color)[0].resize((side, side))
        return any(
            self._certainty(look, self.answering or ANSWERING, self.decomposed.format(cue), [small]) >= enough
            for cue in cues
            if not cue.startswith("all ")
        )

    def _confidence(self, look: Look, cue: str, question: str, node: Node, kind: str) -> float:
        """What the model says of a part of the image."""
        shown = self.views(look, [node])
        usual = LOCAL if self.view == "local" else WHOLE if shown is None else ZOOMED
        return self._certainty(
            look, getattr(self, kind) or usual[kind], question if kind == "answering" else cue, shown
        )

    def _certainty(self, look: Look, template: str, thing: str, shown: list[Image] | None) -> float:
        logits = look.score(self._about(look, shown, template.format(thing)), shown)
        return confidence(logits, *(look.token(word) for word in self.words))

    def _about(self, look: Look, shown: list[Image] | None, text: str) -> str | tuple[str, ...]:
        """A text behind the pictures it is about; what each of two shows is said behind it."""
        if shown is None or len(shown) == 1:
            return text
        marked = "blue" if "red rectangle" in look.prompt else "red"
        return MAIN_IMAGE.format(marked), ZOOMED_IMAGE + text
