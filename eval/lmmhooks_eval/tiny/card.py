"""Write a model card from measured files: ``python -m lmmhooks_eval.tiny.card --model FOLDER``.

Every number on the card comes from ``metrics.json`` (see `evaluate.py`) or ``training.json`` (see `train.py`) in the
model's folder, so that card and measurement cannot disagree. The words are in ``card.md.j2``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jinja2

from lmmhooks_eval.tiny import scenes
from lmmhooks_eval.tiny.probes import SPLITS
from lmmhooks_eval.tiny.vocabulary import CATEGORIES, COLOURS, THEMES

TEMPLATE = Path(__file__).with_name("card.md.j2")


def model_card(folder: Path) -> str:
    """Markdown of the card.

    Parameters
    ----------
    folder
        Model folder with ``metrics.json`` and ``training.json``.
    """
    metrics = _read(folder / "metrics.json")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["strongest"] = strongest_heads
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        training=_read(folder / "training.json"),
        metrics=metrics,
        attention=metrics["attention"],
        run=metrics["run"],
        unlearned=unlearned_tasks(metrics),
        splits=SPLITS,
        scenes=scenes,
        num_categories=len(CATEGORIES),
        num_themes=len(THEMES),
        num_colours=len(COLOURS),
    )


def unlearned_tasks(metrics: dict[str, Any]) -> list[str]:
    """Question types whose interval with the image does not lie above the level without it."""
    seen, blind = metrics["image"]["vqa"], metrics["text_only"]["vqa"]
    return [kind for kind in seen if seen[kind]["low"] <= blind[kind]["value"]]


def strongest_heads(shares: list[float], number: int = 2) -> str:
    """The heads with the largest shares as ``"head: share"``, largest first."""
    order = sorted(range(len(shares)), key=lambda head: -shares[head])[:number]
    return ", ".join(f"{head}: {shares[head]:.2f}" for head in order)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write README.md of a tiny model from its measured files.")
    parser.add_argument("--model", required=True, type=Path, help="model folder with metrics.json and training.json")
    folder = parser.parse_args().model
    (folder / "README.md").write_text(model_card(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
