"""Accuracy of a tiny model: ``python -m lmmhooks_eval.tiny.evaluate --model FOLDER``.

Answers every task of the frozen benchmark with the image, and a part of it without image and with the image of another
scene: a score means nothing without the level that language alone reaches. Writes ``metrics.json`` next to the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lmmhooks_eval.tiny.evidence import sink_evidence
from lmmhooks_eval.tiny.loading import data_dir, load_processor
from lmmhooks_eval.tiny.vocabulary import CATEGORIES, COLOURS

CONDITIONS = ("image", "text_only", "wrong_image")
SHORT_ANSWER_TOKENS = 4
CAPTION_TOKENS = 48
_ITEM = (
    rf"(?:an? (?:{'|'.join(COLOURS)}) (?:{'|'.join(c.name for c in CATEGORIES)})"
    rf"|(?:two|three) (?:{'|'.join(c.plural for c in CATEGORIES)}))"
)
WELL_FORMED = re.compile(rf"The image shows {_ITEM}(?:(?:, {_ITEM})* and {_ITEM})?\.")
"""Grammar of the captions that training shows."""


class Answerer:
    """A model folder that answers questions about stored images, greedily, in batches.

    Parameters
    ----------
    folder
        Folder of the model.
    data
        Folder of the benchmark.
    device
        Where to run; weights are used in float32.
    batch_size
        Questions per `generate` call.
    """

    def __init__(self, folder: Path, data: Path, device: str = "cpu", batch_size: int = 32) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.processor = load_processor(folder)
        self.data, self.device, self.batch_size = data, device, batch_size

    def inputs(self, questions: Sequence[str], images: Sequence[str], condition: str = "image") -> dict[str, Any]:
        """Model inputs of a batch.

        Parameters
        ----------
        questions, images
            Texts and image paths relative to the data folder.
        condition
            ``"text_only"`` removes the image tokens from the prompt; the caller chooses the paths of ``"wrong_image"``.
        """
        pictures = [Image.open(self.data / path).convert("RGB") for path in images]
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        batch = dict(self.processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(self.device))
        if condition != "text_only":
            return batch
        is_text = batch["input_ids"] != self.model.config.image_token_id
        rows = len(questions)  # every row loses the same number of tokens, so the batch stays rectangular
        return {key: batch[key][is_text].view(rows, -1) for key in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def answer(
        self, questions: Sequence[str], images: Sequence[str], condition: str = "image", tokens: int = CAPTION_TOKENS
    ) -> list[str]:
        """Greedy answers, stripped of special tokens and outer spaces."""
        answers: list[str] = []
        for begin in range(0, len(questions), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            batch = self.inputs(questions[part], images[part], condition)
            output = self.model.generate(**batch, max_new_tokens=tokens, do_sample=False)
            new = output[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return answers


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share, 95 % by default; ``(0, 1)`` for no data."""
    if total == 0:
        return 0.0, 1.0
    share, weight = hits / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * ((share * (1 - share) + weight / 4) / total) ** 0.5 / (1 + weight)
    return centre - half, centre + half


def share(flags: Iterable[bool]) -> dict[str, Any]:
    """Share of true flags with its interval: ``{"value", "low", "high", "n"}``."""
    values = list(flags)
    low, high = wilson(sum(values), len(values))
    value = sum(values) / len(values) if values else None
    return {"value": _rounded(value), "low": _rounded(low), "high": _rounded(high), "n": len(values)}


def evaluate_pope(answerer: Answerer, lines: list[dict[str, Any]], condition: str) -> dict[str, Any]:
    """Per split: accuracy, recall, false-positive rate, yes rate and unparsed answers."""
    answers = _answers(answerer, lines, condition)
    splits: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line, answer in zip(lines, answers, strict=True):
        splits[line["split"]].append((line["label"], answer.lower()))
    return {
        split: {
            "accuracy": share(label == answer for label, answer in pairs),
            "recall": share(answer == "yes" for label, answer in pairs if label == "yes"),
            "false_positives": share(answer == "yes" for label, answer in pairs if label == "no"),
            "yes_rate": _rounded(sum(answer == "yes" for _, answer in pairs) / len(pairs)),
            "unparsed": sum(answer not in ("yes", "no") for _, answer in pairs),
        }
        for split, pairs in splits.items()
    }


def evaluate_vqa(answerer: Answerer, lines: list[dict[str, Any]], condition: str) -> dict[str, Any]:
    """Per question type: exact-match accuracy, ignoring case."""
    answers = _answers(answerer, lines, condition)
    types: dict[str, list[bool]] = defaultdict(list)
    for line, answer in zip(lines, answers, strict=True):
        types[line["type"]].append(line["answer"].lower() == answer.lower())
    return {kind: share(flags) for kind, flags in sorted(types.items())}


def evaluate_captions(answerer: Answerer, lines: list[dict[str, Any]], condition: str) -> dict[str, Any]:
    """CHAIR_s, CHAIR_i and object recall against exact ground truth, and captions outside the trained grammar."""
    images = _images(lines, condition)
    captions = answerer.answer([line["prompt"] for line in lines], images, condition)
    words = {word: category.name for category in CATEGORIES for word in (category.name, category.plural)}
    mentioned_total = wrong_total = present_total = found_total = sentences = malformed = 0
    for line, caption in zip(lines, captions, strict=True):
        mentioned = {words[word] for word in re.findall(r"[a-z]+", caption.lower()) if word in words}
        present = set(line["objects"])
        mentioned_total, wrong_total = mentioned_total + len(mentioned), wrong_total + len(mentioned - present)
        present_total, found_total = present_total + len(present), found_total + len(mentioned & present)
        sentences += bool(mentioned - present)
        malformed += WELL_FORMED.fullmatch(caption) is None
    return {
        "chair_s": _rounded(sentences / len(lines)),
        "chair_i": _rounded(wrong_total / max(1, mentioned_total)),
        "recall": _rounded(found_total / present_total),
        "malformed": malformed,
        "n": len(lines),
        "examples": captions[:3],
    }


def evaluate(folder: Path, data: Path, scenes: int | None, control_scenes: int, device: str) -> dict[str, Any]:
    """Everything that a model card reports.

    Parameters
    ----------
    folder, data
        Model and benchmark folders.
    scenes, control_scenes
        Scenes answered with the image (None: all), and in the two control conditions.
    device
        Torch device.
    """
    answerer = Answerer(folder, data, device)
    tasks = {"pope": evaluate_pope, "vqa": evaluate_vqa, "caption": evaluate_captions}
    result: dict[str, Any] = {}
    for condition in CONDITIONS:
        limit = scenes if condition == "image" else control_scenes
        result[condition] = {
            name: run(answerer, _first_scenes(_read_lines(data / f"scenes_{name}.jsonl"), limit), condition)
            for name, run in tasks.items()
        }
        sys.stderr.write(f"{condition} done\n")
    result["attention"] = sink_evidence(answerer, _read_lines(data / "scenes_pope.jsonl"))
    return result


def _answers(answerer: Answerer, lines: list[dict[str, Any]], condition: str) -> list[str]:
    questions = [line["question"] for line in lines]
    return answerer.answer(questions, _images(lines, condition), condition, SHORT_ANSWER_TOKENS)


def _images(lines: list[dict[str, Any]], condition: str) -> list[str]:
    images = [line["image"] for line in lines]
    if condition != "wrong_image":
        return images
    distinct = sorted(set(images))  # the scene half way round: no image keeps its own questions
    other = {image: distinct[(i + len(distinct) // 2) % len(distinct)] for i, image in enumerate(distinct)}
    return [other[image] for image in images]


def _first_scenes(lines: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    kept = set(sorted({line["image"] for line in lines})[:limit])
    return [line for line in lines if line["image"] in kept]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def main() -> None:
    """Command line entry."""
    import transformers

    parser = argparse.ArgumentParser(description="Evaluate a tiny model on the frozen scenes benchmark.")
    parser.add_argument("--model", required=True, type=Path, help="model folder; metrics.json is written into it")
    parser.add_argument("--data", type=Path, default=data_dir())
    parser.add_argument("--scenes", type=int, default=None, help="scenes with image (default: all)")
    parser.add_argument("--control-scenes", type=int, default=100, help="scenes without and with a wrong image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    metrics = evaluate(arguments.model, arguments.data, arguments.scenes, arguments.control_scenes, arguments.device)
    metrics["run"] = {
        "command": f"python -m lmmhooks_eval.tiny.evaluate --model FOLDER --control-scenes {arguments.control_scenes}",
        "minutes": round((time.monotonic() - started) / 60, 1),
        "threads": arguments.threads,
        "device": arguments.device,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (arguments.model / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
