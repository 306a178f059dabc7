"""Withdrawal search (`dyvte`): the first layer before which the image may leave without changing the next token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import kl_div

from lmmhooks_eval.calibration.documents import asked
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import batches
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.tasks import get_task

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["ExitSearch"]


@dataclass(frozen=True)
class ExitSearch:
    """
    Withdraw all visual tokens before every layer and compare the next-token distributions.

    Parameters
    ----------
    task
        Whose prompts are read; answers do not matter.
    limit
        About this many documents. VTW: 20.
    eta
        Largest mean divergence ``KL(withdrawn || full)`` in nats that still counts as no change, at least 0. VTW:
        0.003, on LLaVA-1.5-13B 0.0005, on LLaVA-NeXT-7B 0.0001.
    first
        First layer tried. VTW: 5.
    batch_size
        Prompts per forward.
    seed
        Of the choice of documents.
    """

    task: str = "scenes-vqa"
    limit: int = 20
    eta: float = 0.003
    first: int = 5
    batch_size: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1")
        for name in ("eta", "first"):
            if getattr(self, name) < 0:
                raise TaskError(f"{name}={getattr(self, name)} is not allowed; it must be at least 0")
        get_task(self.task)

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[int, dict[str, Any]]:
        """The layer, or the number of layers where none passes, so that nothing leaves; and all divergences."""
        import lmmhooks
        from lmmhooks.family import resolve

        task = get_task(self.task)
        items, is_benchmark = asked(task, generator.processor, self.limit, self.seed)
        family = resolve(generator.model)
        depth = family.num_layers
        if self.first >= depth:
            raise TaskError(f"first={self.first} is not allowed on a model of {depth} layers; give at most {depth - 1}")
        tried = range(max(self.first, family.deepstack_layers), depth)
        prompts = [
            generator.inputs([item.prompt for item in batch], [task.images(item.doc) for item in batch])
            for batch in batches(items, self.batch_size)
        ]
        scores: dict[int, float] = {}
        with progress:
            progress.begin(len(items) * (len(tried) + 1))
            progress.enter(task.name, "image stays")
            full = [generator.first_logits(inputs).cpu().log_softmax(dim=-1) for inputs in prompts]
            progress.advance(len(items))
            progress.leave(task.name, "image stays", "0")
            for layer in tried:
                progress.enter(task.name, f"layer {layer}")
                at = replace(method, rule="fixed", layer=layer)  # type: ignore[call-arg] # methods with these
                found = []
                with lmmhooks.wrap(generator.model, at, processor=generator.processor):
                    for plain, inputs in zip(full, prompts, strict=True):
                        withdrawn = generator.first_logits(inputs).cpu().log_softmax(dim=-1)
                        found.append(kl_div(plain, withdrawn, reduction="none", log_target=True).sum(dim=-1))
                scores[layer] = float(torch.cat(found).mean())
                progress.advance(len(items), f"{scores[layer]:.4g}")
                progress.leave(task.name, f"layer {layer}", f"{scores[layer]:.4g}")
        chosen = next((layer for layer, score in scores.items() if score <= self.eta), depth)
        passed = f"{scores[chosen]:.3g} nats" if chosen < depth else "no layer passes: nothing leaves"
        return chosen, {
            "summary": f"before layer {chosen} of {depth} on {len(items)} documents of {task.name} "
            f"(eta {self.eta:g}; {passed})",
            "scores": [[layer, round(score, 9)] for layer, score in scores.items()],
            "num_documents": len(items),
            "documents": [item.doc_id for item in items],
            "documents_are_benchmark": is_benchmark,
        }
