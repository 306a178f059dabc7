"""
MVP (multi-view, multi-path reasoning): describe the image three ways, then ask with each description along K paths.

Every view puts a caption of the image in front of the question. The K most likely first tokens are paths: one that is
an answer word counts with its probability, another is continued, and counts for the answer word found there with its
probability times the model's certainty at that word. Views are added with weights; the larger total is the answer.

Differs from the release, which stops at an undefined variable on the first path that is continued: what it is meant to
add is added. A path without an answer word counts for yes there (``unknown="yes"``), here for nothing. The first answer
word of a path decides, not any "yes" before any "no". The wording of captions and prompt is ours, in the sense of the
authors' (UNVERIFIED against their results): pass theirs as `instructions` and `template`. Open answers are grouped by
their normalised text, which the paper does not do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.answering import AnswerMethod, Ask, Draw, Reply

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mvp", "answer_place", "certainties", "normalised"]

INSTRUCTIONS = (
    "Look at the image closely, pixel by pixel: judge shapes, colors and textures, detect the objects they make up, "
    "and describe the image in detail.",
    "Start from the scene as a whole: consider its context, its surroundings and all visual cues, and describe the "
    "image in detail.",
    "Describe this image in detail.",
)
TEMPLATE = "This is the caption of the image:\n{caption}\nQuestion: {question}"


def certainties(logits: Tensor, temperature: float) -> list[float]:
    """Gap between the two largest probabilities of every step; ``logits [t, vocabulary]``, temperature 0 means 1."""
    top = (logits / (temperature or 1.0)).softmax(dim=-1).topk(2, dim=-1).values
    gaps: list[float] = (top[:, 0] - top[:, 1]).tolist()
    return gaps


def answer_place(pieces: Sequence[str], answers: Sequence[str]) -> tuple[str, int] | None:
    """The first answer word of a reply, as in ``answers`` or in lower case, and the number of its first token."""
    words = {word: answer for answer in answers for word in (answer, answer.lower())}
    for match in re.finditer(r"\S+", "".join(pieces)):
        if match.group() in words:
            end = 0
            for place, piece in enumerate(pieces):
                end += len(piece)
                if end > match.start():
                    return words[match.group()], place
    return None


def normalised(text: str) -> str:
    """An open answer without case, punctuation and articles."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


@dataclass(frozen=True)
class Mvp(AnswerMethod):
    """Ask through three captions of the image and along K first tokens."""

    id: ClassVar[str] = "mvp"
    paper: ClassVar[str] = "Look, Compare, Decide: Multi-View Multi-Path Reasoning, arXiv:2408.17150"
    code: ClassVar[str] = "https://github.com/GasolSun36/MVP"

    topk: int = setting(3, help="First tokens explored per view, 1 or more (the authors' script: 3; their default: 5).")
    threshold: float = setting(0.001, help="Least probability of a first token whose path is continued, in [0, 1].")
    weights: tuple[float, ...] = setting(
        (0.4, 0.4, 0.2), help="Weight of each view, 0 or more: bottom-up, top-down, regular; 0 leaves a view out."
    )
    temperature: float = setting(0.7, help="Of captions and paths, 0 or more; 0: the most likely tokens.")
    caption_top_p: float = setting(0.95, help="Nucleus of captions, in (0, 1]; paths are drawn from all tokens.")
    caption_tokens: int = setting(512, help="Longest caption, in tokens, 1 or more.")
    path_tokens: int = setting(50, help="Longest continuation of a path, in tokens, 1 or more.")
    unknown: str = setting("skip", help="A path without answer word counts for nothing ('skip') or for yes ('yes').")
    answers: tuple[str, ...] | None = setting(
        ("Yes", "No"), help="Answer words; equal totals go to the last one. None: open answers, grouped by their text."
    )
    instructions: tuple[str, ...] = setting(
        INSTRUCTIONS, help="What each view's caption is asked for with; wording ours, UNVERIFIED against the authors'."
    )
    template: str = setting(
        TEMPLATE, help="Prompt of a view, with {caption} and {question}; wording ours, UNVERIFIED against the authors'."
    )
    seed: int = setting(336, help="Of captions and paths, 0 or more; replies draw from it, their image and prompt.")

    def __post_init__(self) -> None:
        for name in ("weights", "instructions", "answers"):
            value: Any = getattr(self, name)
            # A text is a sequence too, of letters nobody means.
            self._require(not isinstance(value, str), name, "a list with one entry per view or answer")
            object.__setattr__(self, name, value if value is None else tuple(value))
        self._require(self.topk >= 1, "topk", "1 or more")
        self._require(0 <= self.threshold <= 1, "threshold", "in [0, 1]")
        named = len(self.instructions) > 0 and all(isinstance(text, str) for text in self.instructions)
        self._require(named, "instructions", "a list of texts, one per view")
        total = sum(self.weights) if all(weight >= 0 for weight in self.weights) else 0
        count = len(self.instructions)
        allowed = f"{count} numbers, one per view, 0 or more and not all 0"
        self._require(len(self.weights) == count and total > 0, "weights", allowed)
        self._require(self.temperature >= 0, "temperature", "0 or more")
        self._require(0 < self.caption_top_p <= 1, "caption_top_p", "in (0, 1]")
        self._require(self.caption_tokens >= 1, "caption_tokens", "1 or more")
        self._require(self.path_tokens >= 1, "path_tokens", "1 or more")
        self._require(self.unknown in ("skip", "yes"), "unknown", "'skip' or 'yes'")
        words = self.answers is None or len(set(self.answers)) > 1
        self._require(words, "answers", "two words or more, or None")
        counts_for_yes = self.unknown != "yes" or (self.answers is not None and "Yes" in self.answers)
        self._require(counts_for_yes, "unknown", "'skip' where 'Yes' is none of the answers")
        fits = all(f"{{{name}}}" in self.template for name in ("caption", "question"))
        self._require(fits, "template", "a text with {caption} and {question}")
        self._require(self.seed >= 0, "seed", "0 or more")

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """
        The answer with the largest total over views and paths.

        ``max_new_tokens`` of the call bounds paths, like `path_tokens`; how tokens are drawn is the method's own.
        """
        totals, wordings = self.vote(ask, image, prompt, **generate_kwargs)
        if not totals:
            return ""
        # Equal totals: the last answer word, as in the release, which says yes only if yes has more.
        order = list(totals) if self.answers is None else reversed(list(totals))
        best = max(order, key=lambda said: totals[said])
        return wordings.get(best, best)

    def vote(
        self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Total of every answer, and the first wording of open ones."""
        longest = min(self.path_tokens, generate_kwargs.pop("max_new_tokens", None) or self.path_tokens)
        for name in ("do_sample", "temperature", "top_p", "top_k", "num_beams"):
            generate_kwargs.pop(name, None)
        captions = self._captions(ask, image, generate_kwargs)
        prompts = {
            view: self.template.replace("{question}", prompt.lower()).replace("{caption}", caption)
            for view, caption in captions.items()
        }
        first = ask(image, list(prompts.values()), max_new_tokens=1, **generate_kwargs)
        totals: dict[str, float] = dict.fromkeys(self.answers or (), 0.0)
        paths: list[tuple[int, int, float]] = []
        for view, reply in zip(prompts, first, strict=True):
            chances = reply.logits[0].softmax(dim=-1)
            # No path begins with a placeholder of an image.
            chances[list(ask.unspeakable)] = 0.0
            top = chances.topk(min(self.topk, len(chances)))
            for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                if (word := ask.decode(token)) in (self.answers or ()):
                    totals[word] += self.weights[view] * probability
                elif probability >= self.threshold:
                    paths.append((view, token, probability))
        wordings: dict[str, str] = {}
        if paths:
            replies = ask(
                image,
                [prompts[view] for view, _, _ in paths],
                max_new_tokens=longest,
                starts=[token for _, token, _ in paths],
                draw=Draw(self.temperature, 1.0, self.seed),
                **generate_kwargs,
            )
            for (view, token, probability), reply in zip(paths, replies, strict=True):
                said, certainty = self._judge(ask, token, reply, wordings)
                if said is not None:
                    totals[said] = totals.get(said, 0.0) + self.weights[view] * probability * certainty
        return totals, wordings

    def _captions(self, ask: Ask, image: Any, generate_kwargs: Mapping[str, Any]) -> dict[int, str]:
        """Caption of every view that counts; made once per image."""
        views = [view for view, weight in enumerate(self.weights) if weight]
        known = ask.memory.setdefault(("captions", ask.digest(image), repr(sorted(generate_kwargs.items()))), {})
        missing = [view for view in views if view not in known]
        if missing:
            draw = Draw(self.temperature, self.caption_top_p, self.seed)
            prompts = [self.instructions[view] for view in missing]
            replies = ask(image, prompts, max_new_tokens=self.caption_tokens, draw=draw, **generate_kwargs)
            known.update({view: reply.text for view, reply in zip(missing, replies, strict=True)})
        return {view: known[view] for view in views}

    def _judge(self, ask: Ask, token: int, reply: Reply, wordings: dict[str, str]) -> tuple[str | None, float]:
        """What a continued path says, and how certain the model was of it."""
        gaps = certainties(reply.logits, self.temperature)
        if self.answers is None:
            text = f"{ask.decode(token)}{''.join(reply.pieces)}".strip()
            key = normalised(text)
            wordings.setdefault(key, text)
            return (key, sum(gaps) / len(gaps)) if key and gaps else (None, 0.0)
        found = answer_place(reply.pieces, self.answers)
        if found is not None:
            return found[0], gaps[found[1]]
        return ("Yes", 1.0) if self.unknown == "yes" else (None, 0.0)
