"""Training batches. A batch is a function of (seed, stage, step) alone, so that a resumed run sees the same data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from lmmhooks_eval.tiny import questions as ask
from lmmhooks_eval.tiny.heads import SceneTargets, scene_targets
from lmmhooks_eval.tiny.models import VISUAL_TOKENS, prompt_layout
from lmmhooks_eval.tiny.packing import Packing, pack_rows
from lmmhooks_eval.tiny.questions import Question
from lmmhooks_eval.tiny.render import render
from lmmhooks_eval.tiny.scenes import MAX_CATEGORIES, Scene, sample_scene

STAGES = ("vision", "joint")
SLOTS_PER_TYPE = {"existence": 6, "colour": 2, "attribute": 2, "count": 2, "side": 2, "relation": 1}
NUM_SLOTS = sum(SLOTS_PER_TYPE.values())
TEXT_ONLY_SHARE = 0.08
"""Share of joint batches without image: they make text-only branches of contrastive methods meaningful."""


@dataclass(frozen=True)
class PackedRows:
    """Packed rows of a batch.

    Parameters
    ----------
    ids, labels
        int64 ``(B, packing.length)``, see `pack_rows`.
    packing
        Layout of the rows.
    has_image
        False for text-only batches, whose rows have no image tokens.
    """

    ids: Tensor
    labels: Tensor
    packing: Packing
    has_image: bool


@dataclass(frozen=True)
class Batch:
    """A training batch.

    Parameters
    ----------
    images
        uint8 ``(B, 112, 112, 3)``.
    targets
        Targets of the vision heads.
    rows
        Packed questions and captions, or None in the vision stage.
    """

    images: np.ndarray
    targets: SceneTargets
    rows: PackedRows | None = None


def draw_scenes(entropy: Sequence[int], number: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes and images; scene i comes from the generator seeded with ``(*entropy, i)``.

    Returns
    -------
    tuple
        List of scenes and uint8 ``(number, 112, 112, 3)``.
    """
    scenes, images = [], []
    for index in range(number):
        rng = np.random.default_rng((*entropy, index))
        scene = sample_scene(rng)
        scenes.append(scene)
        images.append(render(scene, rng))
    return scenes, np.stack(images)


def scene_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The questions of one training row, at most `NUM_SLOTS`."""
    makers = {
        "existence": ask.existence_questions,
        "colour": ask.colour_questions,
        "attribute": ask.attribute_questions,
        "count": ask.count_questions,
        "side": ask.side_questions,
        "relation": ask.relation_questions,
    }
    return [question for kind, number in SLOTS_PER_TYPE.items() for question in makers[kind](scene, rng, number)]


class PromptPacker:
    """Turns questions into packed rows of a model's own prompt format.

    Parameters
    ----------
    name
        Name of the bundled model.
    tokenizer
        Its tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.layout = prompt_layout(name, tokenizer)
        image_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
        raw = list(tokenizer(self.layout.before)["input_ids"])
        at = raw.index(image_id)
        self.image_prefix = raw[:at] + [image_id] * VISUAL_TOKENS + raw[at + 1 :]
        without = self.layout.before_without_image
        self.lead = " " if without.endswith(" ") else ""
        # Two renderings of "no image": the image tokens cut out of the prompt, as contrastive decoding does it, and
        # the chat template without an image, where the space before the question belongs to its first word.
        self.stripped_prefix = raw[:at] + raw[at + 1 :]
        self.template_prefix = list(tokenizer(without.removesuffix(self.lead) if self.lead else without)["input_ids"])
        self.pad_id = int(tokenizer.pad_token_id)
        self._cache: dict[tuple[str, str, str], tuple[list[int], list[int]]] = {}
        widest = "The image shows " + ", ".join(["a red cup"] * MAX_CATEGORIES) + "."
        self.slot_length = sum(map(len, self.encode(ask.attribute("cup", "red", True))))
        self.caption_length = sum(map(len, self.encode(Question("caption", ask.CAPTION_PROMPT, widest))))

    def encode(self, question: Question, lead: str = "") -> tuple[list[int], list[int]]:
        """Token ids of the question up to the answer, and of the answer with its end token."""
        key = (lead, question.text, question.answer)
        if key not in self._cache:
            before = lead + question.text + self.layout.between
            after = self.layout.answer_prefix + question.answer + self.layout.end
            ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
            if question.type == "caption":  # captions hardly repeat: caching them would only grow
                return ids[0], ids[1]
            self._cache[key] = (ids[0], ids[1])
        return self._cache[key]

    def pack(
        self, rows: Sequence[Sequence[Question]], captions: Sequence[Question] | None = None, mode: str = "image"
    ) -> tuple[Tensor, Tensor, Packing]:
        """Pack one row per image.

        Parameters
        ----------
        rows
            Questions per image, at most `NUM_SLOTS` are kept.
        captions
            One caption per image, or None for rows without.
        mode
            ``"image"``, ``"stripped"`` or ``"template"``: the prefix to use.

        Returns
        -------
        tuple
            ids, labels (see `pack_rows`) and the layout.
        """
        prefixes = {"image": self.image_prefix, "stripped": self.stripped_prefix, "template": self.template_prefix}
        prefix, lead = prefixes[mode], self.lead if mode == "template" else ""
        groups: tuple[tuple[int, int], ...] = ((NUM_SLOTS, self.slot_length),)
        encoded = []
        for questions in rows:
            slots = [self.encode(question, lead) for question in questions[:NUM_SLOTS]]
            encoded.append(slots + [([], [])] * (NUM_SLOTS - len(slots)))
        if captions is not None:
            groups += ((1, self.caption_length),)
            for slots, text in zip(encoded, captions, strict=True):
                slots.append(self.encode(text, lead))
        packing = Packing(len(prefix), groups)
        ids, labels = pack_rows(packing, prefix, encoded, self.pad_id)
        return ids, labels, packing


class StepData(Dataset[Batch]):
    """Map-style data set whose items are whole batches, one per step.

    Parameters
    ----------
    stage
        ``"vision"`` or ``"joint"``.
    seed
        Seed of the training run.
    batch_size
        Images per batch.
    packer
        Needed in the joint stage.
    """

    def __init__(self, stage: str, seed: int, batch_size: int, packer: PromptPacker) -> None:
        self.stage, self.seed, self.batch_size, self.packer = stage, seed, batch_size, packer

    def __getitem__(self, step: int) -> Batch:
        entropy = (self.seed, STAGES.index(self.stage), step)
        scenes, images = draw_scenes(entropy, self.batch_size)
        targets = scene_targets(scenes)
        if self.stage == "vision":
            return Batch(images, targets)
        rng = np.random.default_rng((*entropy, self.batch_size))
        rows = [scene_questions(scene, rng) for scene in scenes]
        captions = [ask.caption(scene) for scene in scenes]
        has_image = rng.random() >= TEXT_ONLY_SHARE
        mode = "image" if has_image else ("stripped", "template")[int(rng.integers(2))]
        return Batch(images, targets, PackedRows(*self.packer.pack(rows, captions, mode), has_image))


def answer_loss(states: Tensor, labels: Tensor, head: torch.nn.Module) -> Tensor:
    """Mean cross entropy over answer tokens; the head runs on labelled positions only.

    Parameters
    ----------
    states
        ``(B, N, width)``.
    labels
        int64 ``(B, N)``, what each position predicts, negative where there is no loss.
    head
        The language model head.
    """
    labelled = labels >= 0
    logits = head(states[labelled])
    return torch.nn.functional.cross_entropy(logits.float(), labels[labelled])
