"""Heads that look at the image (`yopo`), told apart by the attention of generated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks_eval.calibration.documents import asked
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import batches
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.tasks import get_task

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.base import Method

__all__ = ["VisualHeadSearch"]


@dataclass(frozen=True)
class _Watcher(AttentionMethod):
    """Notes, layer by layer, how much more the first generated token looks at the image than elsewhere."""

    id: ClassVar[str] = "yopo-calibration"
    rows: ClassVar[str] = "last"

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        from lmmhooks.methods.reduction.yopo import looks_at_image

        if not context.is_prefill and context.layer not in context.memory:
            context.memory[context.layer] = looks_at_image(weights[:, :, -1], context.layout.visual)
        return weights


@dataclass(frozen=True)
class VisualHeadSearch:
    """
    Keep the heads in which the first generated token's attention on the image exceeds a share of its other attention.

    Parameters
    ----------
    task
        Whose prompts are answered.
    limit
        About this many documents. Released scripts: 100 to 400.
    threshold
        Attention on visual keys over attention on all others, above which a head looks at the image. Released:
        Qwen2-VL-7B 0.07; InternVL2 0.11 (8B), 0.052 (26B), 0.08 (4B); LLaVA-13B 0.2, 0.077, 0.035, which keep 10, 20,
        30 of 40 heads.
    rule
        ``"mean"``: the ratio, averaged over documents, exceeds it (released for InternVL2 and Qwen2-VL); ``"vote"``:
        the ratios of most documents do (released for LLaVA, whose script asks for more than 40 votes).
    batch_size
        Prompts per forward.
    seed
        Of the choice of documents.
    """

    FIRST: ClassVar[int] = 2
    """First layer in which heads may be found inactive; the released masks keep layers 0 and 1 whole."""

    task: str = "scenes-vqa"
    limit: int = 100
    threshold: float = 0.07
    rule: Literal["mean", "vote"] = "mean"
    batch_size: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1")
        if self.threshold <= 0:
            raise TaskError(f"threshold={self.threshold} is not allowed; it must be positive")
        if self.rule not in ("mean", "vote"):
            raise TaskError(f"rule={self.rule!r} is not allowed; it must be 'mean' or 'vote'")
        get_task(self.task)

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """``{layer: heads that look at the image}`` for every layer, and the ratios behind it."""
        import lmmhooks
        from lmmhooks.engines.runtime import find_runtime
        from lmmhooks.family import resolve

        task = get_task(self.task)
        items, is_benchmark = asked(task, generator.processor, self.limit, self.seed)
        family = resolve(generator.model)
        ratios = []
        with progress, lmmhooks.wrap(generator.model, _Watcher()) as patch:
            progress.begin(len(items))
            progress.enter(task.name, "heads")
            for batch in batches(items, self.batch_size):
                inputs = generator.inputs([item.prompt for item in batch], [task.images(item.doc) for item in batch])
                # The row of the first generated token is computed on the way to the second.
                generator.tokens(inputs, 2)
                runtime = find_runtime(generator.model)
                assert runtime is not None
                seen = runtime.last_state.memory(patch.methods[0])
                ratios.append(torch.stack([seen[layer].cpu() for layer in range(family.num_layers)], dim=1))
                progress.advance(len(batch))
        # [documents, layers, heads]
        every = torch.cat(ratios)
        if self.rule == "mean":
            active = every.mean(dim=0) > self.threshold
        else:
            active = (every > self.threshold).float().mean(dim=0) > 0.5
        active[: self.FIRST] = True
        kept = {str(layer): row.nonzero().flatten().tolist() for layer, row in enumerate(active)}
        number = int(active.sum())
        return kept, {
            "summary": f"{number} of {active.numel()} heads look at the image in {len(items)} documents of {task.name}",
            "ratios": [[round(ratio, 6) for ratio in row] for row in every.mean(dim=0).tolist()],
            "num_documents": len(items),
            "documents": [item.doc_id for item in items],
            "documents_are_benchmark": is_benchmark,
        }
