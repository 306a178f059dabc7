"""
Gaze-shift guided fusion: where attention rises while the question is read, the answer looks harder.

From one content word of the question to the next, attention to relevant patches rises while sinks stay flat. The
positive increments in one layer, summed over the words and over the half of the heads in which they are largest, become
a map S of the image in [1, e^alpha]. At every step, in a range of layers, the half of the heads that look most at the
image have their image weights multiplied by S, and the half that look most at the question have theirs raised by the
factor by which image attention grew; rows are renormalised.

Differs from the released code, which finds the question by fixed offsets, tags words with spaCy, reads the first row of
a batch only and fails on questions without content words: here the question is found from the chat template where the
tokenizer is known, function words go by a list, every row has its own map (of all its images together), and all words
count where none is a content word. A prompt whose images are followed by no question is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.base import setting
from lmmhooks.methods.words import (
    content_tokens,
    listed_words,
    load_tagger,
    surroundings,
    tagged_words,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.prompt import PromptContext

__all__ = ["Gift", "enhance", "saliency_map"]

#: Layers and strength by family, width and depth. Source: released code.
PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llava", 4096, 32): {"saliency_layers": (11,), "enhancement_layers": tuple(range(12, 23)), "alpha": 5.0},
    ("llava", 5120, 40): {"saliency_layers": (10,), "enhancement_layers": tuple(range(14, 21)), "alpha": 5.0},
    ("qwen2_vl", 3584, 28): {"saliency_layers": (14,), "enhancement_layers": tuple(range(5, 19)), "alpha": 4.0},
}
#: Text tokens before and after the question, between the last image and the answer. Source: released code.
PUBLISHED_SKIP = {"llava": (2, 5), "qwen2_vl": (1, 5)}


def saliency_map(rises: Tensor, visual: Tensor, alpha: float) -> Tensor:
    """
    Factor on the attention to every image token.

    Parameters
    ----------
    rises
        ``[L, B, H, N]`` float32: positive increments per layer and head, summed over content words; 0 off the image.
        Their scale does not matter.
    visual
        ``[B, N]`` bool.
    alpha
        Log of the largest factor.

    Returns
    -------
    Tensor
        ``[B, N]`` float32 in ``[1, e^alpha]``, 1 off the image and where all increments are equal.
    """
    best = rises.sum(dim=-1).topk(max(rises.shape[2] // 2, 1), dim=2).indices
    mean = rises.gather(2, best[..., None].expand(-1, -1, -1, rises.shape[-1])).mean(dim=(0, 2))
    count = visual.sum(dim=-1, keepdim=True)
    centre = (mean * visual).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    variance = ((mean - centre).square() * visual).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    clipped = mean.clamp(centre - 3 * variance.sqrt(), centre + 3 * variance.sqrt())
    low = clipped.masked_fill(~visual, math.inf).amin(dim=-1, keepdim=True)
    high = clipped.masked_fill(~visual, -math.inf).amax(dim=-1, keepdim=True)
    # Minus infinity without an image, 0 where all is equal: neither is a range to stretch.
    shift = torch.where(visual & (high > low), (clipped - low) / (high - low), 0.0)
    return torch.exp(alpha * shift)


def enhance(weights: Tensor, saliency: Tensor, visual: Tensor, question: Tensor) -> Tensor:
    """
    Raise image attention by a map, and question attention by as much overall.

    Parameters
    ----------
    weights
        ``[B, H, R, N]`` rows that sum to 1.
    saliency
        ``[B, N]``, 1 off the image.
    visual, question
        ``[B, N]`` bool.

    Returns
    -------
    Tensor
        Same shape; rows still sum to 1, and samples whose map is 1 everywhere are what they were.
    """
    visual, question = visual[:, None, None, :], question[:, None, None, :]
    image = weights * visual
    looking = _upper_half(image.sum(dim=-1, keepdim=True))
    raised = torch.where(looking & visual, weights * saliency[:, None, None, :], weights)
    # One factor per row for all heads: the growth of image attention in those that look at the image.
    before, after = ((part * (looking & visual)).sum(dim=(1, 3), keepdim=True) for part in (weights, raised))
    growth = torch.where(before > 0, after / before, 1.0)
    asking = _upper_half((weights * question).sum(dim=-1, keepdim=True))
    raised = torch.where(asking & question, raised * growth, raised)
    changes = (saliency > 1).any(dim=-1)[:, None, None, None]
    return torch.where(changes, raised / raised.sum(dim=-1, keepdim=True), weights)


def _upper_half(mass: Tensor) -> Tensor:
    """The ``floor(H / 2)`` heads with the largest mass ``[B, H, R, 1]``, per row."""
    best = mass.topk(max(mass.shape[1] // 2, 1), dim=1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, best, True)


@dataclass(frozen=True)
class Gift(AttentionMethod):
    """Gaze-shift guided cross-modal fusion enhancement (see the module docstring)."""

    id: ClassVar[str] = "gift"
    paper: ClassVar[str] = (
        "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation, "
        "ICML 2026 according to its repository, 2510.22067"
    )
    code: ClassVar[str] = "https://github.com/amazon-science/GIFT"
    rows: ClassVar[str] = "last"

    alpha: float | None = setting(
        None,
        help="Log of the largest factor on image attention, at least 0. None: 5 LLaVA-1.5, 4 Qwen2-VL (released code), "
        "else 5.",
    )
    saliency_layers: tuple[int, ...] | None = setting(
        None,
        help="Layers whose attention is followed through the question, 0-based. None: (11,) LLaVA-1.5-7B, (10,) 13B, "
        "(14,) Qwen2-VL-7B; else layer 11 of 32, scaled to the depth (UNVERIFIED).",
    )
    enhancement_layers: tuple[int, ...] | None = setting(
        None,
        help="Layers whose attention is raised, 0-based. None: 12 to 22 LLaVA-1.5-7B, 14 to 20 13B, 5 to 18 "
        "Qwen2-VL-7B; else layers 12 to 22 of 32, scaled to the depth (UNVERIFIED).",
    )
    words: Literal["content", "all", "spacy"] = setting(
        "content",
        help="Words of the question that count: 'content': all but English function words, by a list; 'spacy': by "
        "spaCy's tags, as published; both need the processor given to wrap, without which 'all' count.",
    )
    question_skip: tuple[int, int] | None = setting(
        None,
        help="Text tokens after the last image, at least 1, and before the answer that are no question. None: from the "
        "chat template of the processor given to wrap; without one (2, 5) LLaVA, (1, 5) Qwen2-VL (released code), "
        "else (1, 0).",
    )

    def __post_init__(self) -> None:
        for name in ("saliency_layers", "enhancement_layers", "question_skip"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._require(self.alpha is None or 0 <= self.alpha < math.inf, "alpha", "a number, at least 0, or None")
        self._require(self.words in ("content", "all", "spacy"), "words", "'content', 'all' or 'spacy'")
        skip = self.question_skip
        valid = skip is None or (len(skip) == 2 and skip[0] >= 1 and skip[1] >= 0)
        # The first word of the question rises above the token before it.
        self._require(valid, "question_skip", "two counts of tokens, the first at least 1, or None")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        return dict(PUBLISHED.get((family.name, family.hidden_size, family.num_layers), {}))

    def check(self, family: Any) -> None:
        bound = self.bind(family)
        for name in ("saliency_layers", "enhancement_layers"):
            layers = getattr(bound, name)
            inside = layers and all(0 <= layer < family.num_layers for layer in layers)
            bound._require(bool(inside), name, f"layers of this model, 0 to {family.num_layers - 1}, at least one")
        if self.words == "spacy":
            load_tagger()

    def bind(self, family: Any) -> Gift:
        scale = family.num_layers / 32
        derived: dict[str, Any] = {
            "alpha": 5.0,
            "saliency_layers": (int(11 * scale),),
            "enhancement_layers": tuple(range(math.ceil(12 * scale), int(22 * scale) + 1)),
        }
        return replace(self, **{name: value for name, value in derived.items() if getattr(self, name) is None})

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0

    def layers(self, family: Any) -> Sequence[int]:
        return self.bind(family).enhancement_layers or ()

    def watched(self, family: Any) -> Mapping[int, str]:
        return dict.fromkeys(self.bind(family).saliency_layers or (), "instruction")

    def find_question(self, ids: Sequence[int], family: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Places of the question among the text tokens after the last image of a row, and those of them that count."""
        head, tail = self.question_skip or PUBLISHED_SKIP.get(family.name, (1, 0))
        if self.question_skip is None and tokenizer is not None:
            head, tail = surroundings(tokenizer, ids, unknown=tail)
        question = list(range(max(head, 1), len(ids) - tail))
        if self.words == "all" or tokenizer is None:
            return question, question
        find = tagged_words if self.words == "spacy" else listed_words
        flags = content_tokens(tokenizer, [ids[place] for place in question], find)
        return question, [place for place, flag in zip(question, flags, strict=True) if flag] or question

    def prepare(self, prompt: PromptContext) -> None:
        ids, text = prompt.input_ids.cpu(), prompt.layout.instruction.cpu()
        question, counted = torch.zeros_like(text), torch.zeros_like(text)
        for row in range(prompt.layout.batch):
            stops = [span.stop for span in prompt.layout.spans_of(row)]
            if any(stops):
                places = text[row].nonzero().flatten()
                places = places[places >= max(stops)]
                asked, counts = self.find_question(ids[row, places].tolist(), prompt.family, prompt.tokenizer)
                question[row, places[asked]] = True
                counted[row, places[counts]] = True
        device = prompt.layout.segment.device
        prompt.memory.update(question=question.to(device), counted=counted.to(device), rises={}, tails={})

    def watch(self, weights: Tensor, real: Tensor, context: AttentionContext) -> None:
        memory, layer, visual = context.memory, context.layer, context.layout.visual
        counted = context.localize(memory["counted"]).gather(1, context.rows) & real
        # Rows come in blocks, in order; the first one of a prompt is never counted.
        before = torch.cat([memory["tails"].get(layer, weights[:, :, :1]), weights[:, :, :-1]], dim=2)
        rise = ((weights - before).clamp_(min=0) * counted[:, None, :, None]).sum(dim=2) * visual[:, None]
        memory["tails"][layer] = weights[:, :, -1:].clone()
        memory["rises"][layer] = memory["rises"].get(layer, 0) + context.globalize(rise)
        # Layers may see different remainders of an image; what is gone from one of them has no full map.
        memory["visual"] = memory.get("visual", True) & context.globalize(visual)

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        memory = context.memory
        if not memory["rises"]:
            return weights
        if "saliency" not in memory:
            assert self.alpha is not None
            memory["saliency"] = saliency_map(torch.stack(list(memory["rises"].values())), memory["visual"], self.alpha)
            memory["tails"].clear()
        saliency, question = context.localize(memory["saliency"], fill=1), context.localize(memory["question"])
        return enhance(weights, saliency, context.layout.visual, question)
