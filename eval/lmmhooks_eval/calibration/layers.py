"""Layer contribution (`shortv`): how much the next token changes when visual tokens stand still in one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmmhooks_eval.calibration.documents import asked
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import batches
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.tasks import get_task

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["LayerSearch"]


@dataclass(frozen=True)
class LayerSearch:
    """
    Freeze visual tokens in every layer alone and compare the next-token distributions.

    Parameters
    ----------
    task
        Whose prompts are read; answers do not matter. Released: GQA and Flickr30k.
    limit
        About this many documents. Released script: 20 of each of its two tasks.
    batch_size
        Prompts per forward.
    seed
        Of the choice of documents.
    """

    task: str = "scenes-vqa"
    limit: int = 40
    batch_size: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1")
        get_task(self.task)

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[list[int], dict[str, Any]]:
        """All layers in order of increasing contribution, the lower layer first in a tie; and the contributions."""
        import lmmhooks
        from lmmhooks.family import resolve
        from lmmhooks.methods.reduction.shortv import layer_contribution

        task = get_task(self.task)
        items, is_benchmark = asked(task, generator.processor, self.limit, self.seed)
        depth = resolve(generator.model).num_layers
        prompts = [
            generator.inputs([item.prompt for item in batch], [task.images(item.doc) for item in batch])
            for batch in batches(items, self.batch_size)
        ]
        scores = []
        with progress:
            progress.begin(len(items) * (depth + 1))
            progress.enter(task.name, "no layer frozen")
            full = [generator.first_logits(inputs).cpu() for inputs in prompts]
            progress.advance(len(items))
            progress.leave(task.name, "no layer frozen", "0")
            for layer in range(depth):
                progress.enter(task.name, f"layer {layer}")
                alone = replace(method, layers=(layer,), num_layers=None)  # type: ignore[call-arg] # methods with these
                with lmmhooks.wrap(generator.model, alone, processor=generator.processor):
                    found = [
                        layer_contribution(plain, generator.first_logits(inputs).cpu())
                        for plain, inputs in zip(full, prompts, strict=True)
                    ]
                scores.append(float(torch.cat(found).mean()))
                progress.advance(len(items), f"{scores[-1]:.4g}")
                progress.leave(task.name, f"layer {layer}", f"{scores[-1]:.4g}")
        order = sorted(range(depth), key=lambda layer: (scores[layer], layer))
        return order, {
            "summary": f"layers in order of increasing contribution on {len(items)} documents of {task.name}: "
            f"{', '.join(map(str, order))}",
            "scores": [round(score, 9) for score in scores],
            "num_documents": len(items),
            "documents": [item.doc_id for item in items],
            "documents_are_benchmark": is_benchmark,
        }
