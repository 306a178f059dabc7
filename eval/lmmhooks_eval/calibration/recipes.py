"""Pruning recipes (`fitprune`): how many visual tokens every layer may lose for what they receive to stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.calibration.documents import asked
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import batches
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.tasks import get_task

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["RecipeFit"]

REDUCTIONS = tuple(percent / 100 for percent in range(10, 100, 10))
"""Those for which recipes were released."""


@dataclass(frozen=True)
class RecipeFit:
    """
    Fit a recipe for every reduction of `REDUCTIONS` that the depth of the model allows.

    Parameters
    ----------
    task
        Whose prompts are read; answers do not matter.
    limit
        About this many documents. Released: 0.01 % of 665 thousand, chosen by file name (UNVERIFIED).
    batch_size
        Prompts per forward; attention of all their rows is looked at in every layer.
    seed
        Of the choice of documents.
    """

    task: str = "scenes-vqa"
    limit: int = 64
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1")
        get_task(self.task)

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """``{reduction: share of the visual tokens deleted per layer}``, and on what it was fitted."""
        from lmmhooks.cost import DecoderShape
        from lmmhooks.engines.received import received_by_layer
        from lmmhooks.engines.runtime import Runtime, find_runtime
        from lmmhooks.family import resolve
        from lmmhooks.methods.reduction.recipes import fit_recipe

        task = get_task(self.task)
        items, is_benchmark = asked(task, generator.processor, self.limit, self.seed)
        runtime = find_runtime(generator.model) or Runtime(resolve(generator.model))
        shape = DecoderShape.from_config(runtime.family.text_config)
        samples = []
        with progress:
            progress.begin(len(items) + len(REDUCTIONS))
            progress.enter(task.name, "attention received")
            for batch in batches(items, self.batch_size):
                inputs = generator.inputs([item.prompt for item in batch], [task.images(item.doc) for item in batch])
                samples += received_by_layer(runtime, inputs)
                progress.advance(len(batch))
            progress.leave(task.name, "attention received", f"{len(samples)}")
            progress.enter(task.name, "recipes")
            fitted = {}
            for reduction in REDUCTIONS:
                recipe = fit_recipe(samples, reduction, shape)
                progress.advance(1)
                if recipe is not None:
                    fitted[f"{reduction:g}"] = [round(share, 9) for share in recipe]
            progress.leave(task.name, "recipes", f"{len(fitted)}")
        return fitted, {
            "summary": f"recipes for {len(fitted)} reductions on {len(items)} documents of {task.name}"
            + ("" if len(fitted) == len(REDUCTIONS) else f"; {shape.layers} layers do not reach the others"),
            "visual_tokens": sorted({len(own[0]) for own, _ in samples}),
            "num_documents": len(items),
            "documents": [item.doc_id for item in items],
            "documents_are_benchmark": is_benchmark,
        }
