"""Run folders written without a model, for the tests of scoring, costs and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmmhooks_eval.recipes import build
from lmmhooks_eval.store import RunFolder
from lmmhooks_eval.tasks import get_task

RECIPE: dict[str, Any] = {
    "name": "made-up",
    "model": "tiny-llava",
    "tasks": [{"name": "scenes-pope"}],
    "variants": {"v": ["var"]},
    "statistics": {"draws": 400},
    "max_unparsed": 1.0,
}


def answer(
    doc: dict[str, Any], variant: str, text: str, *, task: str = "scenes-pope", batch: int = 0
) -> dict[str, Any]:
    """A line of ``samples.jsonl`` as the runner writes it."""
    half = variant != "baseline"
    return {
        "key": f"{task}/{variant}/{doc['id']}",
        "task": task,
        "variant": variant,
        "doc_id": doc["id"],
        "cluster": doc["image"],
        "doc": doc,
        "prompt": f"USER: <image>\n{doc.get('question') or doc.get('prompt')} ASSISTANT:",
        "image": "digest",
        "text": text,
        "prompt_tokens": 80,
        "visual_tokens": 64,
        "new_tokens": 2,
        "stop_reason": "eos",
        "visual_kept": [32 if half else 64] * 8,
        "batch": batch,
        "batch_size": 4,
        "batch_steps": 2,
        "batch_preprocess_ms": 4.0,
        "batch_prefill_ms": (10.0 if half else 20.0) + batch,
        "batch_decode_ms": 5.0,
        "batch_memory_mib": 1.5,
        "batch_kv_bytes": [1 << (17 if half else 18)] * 8,
        "batch_prefill_flops": 1e9 if half else 2e9,
    }


def documents(task: str = "scenes-pope", number: int = 36) -> list[dict[str, Any]]:
    """Documents of a bundled task, spread over it, so that most have an image of their own."""
    docs = get_task(task).load()
    return [dict(doc) for doc in docs[:: len(docs) // number][:number]]


def write_run(path: Path, records: list[dict[str, Any]], **changes: Any) -> Path:
    """A run folder that holds these answers; returns its path."""
    with RunFolder(path, build({**RECIPE, **changes}, "test").expanded()) as folder:
        folder.append(records)
    return path


def perfect(doc: dict[str, Any]) -> str:
    """The right answer of a scenes-pope document."""
    return str(doc["label"]).capitalize()


def opposite(doc: dict[str, Any]) -> str:
    """The wrong answer of a scenes-pope document."""
    return "No" if doc["label"] == "yes" else "Yes"
