"""Steering directions (`vti`): shifts of hidden states, seen on demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lmmhooks_eval.calibration.documents import Demo, demos_from_file, demos_from_task
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.identity import item_seed
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.tasks import get_task

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.methods.base import Method

__all__ = ["DirectionEstimate"]


@dataclass(frozen=True)
class DirectionEstimate:
    """
    Estimate the textual and the visual direction of every layer.

    Parameters
    ----------
    task
        Its documents hold the demonstrations, unless ``demos`` is given.
    demos
        JSON-lines file with ``image``, ``question``, ``value`` and ``h_value``.
    limit
        Number of demonstrations. Released script: 50 to 70.
    trials
        Masked copies of every image. Released: 50.
    mask_ratio
        Share of the patches that is masked, in (0, 1]. Released: 0.99.
    grouping
        See `lmmhooks.methods.attention.directions.visual_direction`.
    batch_size
        Masked copies that pass the vision tower together.
    seed
        Of the choice of demonstrations and of the masks. Released: 42.
    """

    task: str = "scenes-caption"
    demos: str | None = None
    limit: int = 60
    trials: int = 50
    mask_ratio: float = 0.99
    grouping: Literal["released", "token"] = "released"
    batch_size: int = 10
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio <= 1:
            raise TaskError(f"mask_ratio={self.mask_ratio} is not allowed; it must be in (0, 1]")
        if self.grouping not in ("released", "token"):
            raise TaskError(f"grouping={self.grouping!r} is not allowed; it must be 'released' or 'token'")
        for name in ("limit", "trials", "batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1")
        get_task(self.task)
        if self.demos is not None and not Path(self.demos).expanduser().is_file():
            raise TaskError(f"demonstrations {self.demos} do not exist; give a JSON-lines file")

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[Any, dict[str, Any]]:
        """A `TensorSet` with ``textual`` and ``visual``, and on what it was measured."""
        from lmmhooks.engines.runtime import Runtime, find_runtime
        from lmmhooks.family import resolve
        from lmmhooks.methods.attention.directions import textual_direction, visual_direction
        from lmmhooks.methods.tensors import TensorSet

        runtime = find_runtime(generator.model) or Runtime(resolve(generator.model))
        demos, is_benchmark = self._demos(generator.processor)
        if len(demos) < 2:
            raise TaskError(f"directions need at least 2 demonstrations, given: {len(demos)}")
        textual, visual = [], []
        with progress:
            progress.begin(len(demos))
            progress.enter(self.demos or self.task, "demonstrations")
            for demo in demos:
                textual.append(_textual_shift(runtime, generator, demo))
                visual.append(self._visual_shift(runtime, generator, demo))
                progress.advance(1)
        text, image = torch.stack(textual), _stack(visual)
        directions = TensorSet({"textual": textual_direction(text), "visual": visual_direction(image, self.grouping)})
        agreement = {"textual": _agreement(text), "visual": _agreement(image)}
        return directions, {
            "summary": f"directions of {len(demos)} demonstrations; a demonstration's own shift has cosine "
            f"{agreement['textual']:.2f} (textual) and {agreement['visual']:.2f} (visual) with the mean of all",
            "agreement": agreement,
            "documents": [demo.id for demo in demos],
            "documents_are_benchmark": is_benchmark,
        }

    def _demos(self, processor: Any) -> tuple[list[Demo], bool]:
        if self.demos is not None:
            return demos_from_file(Path(self.demos).expanduser(), processor, self.limit), False
        return demos_from_task(get_task(self.task), processor, self.limit, self.seed)

    def _visual_shift(self, runtime: Runtime, generator: Generator, demo: Demo) -> Tensor:
        """``[L + 1, T, D]``: mean over masked copies minus the image as it is."""
        from lmmhooks.engines.states import masked, vision_states

        masks = torch.Generator().manual_seed(item_seed(self.seed, demo.id))
        clean = vision_states(runtime, generator.inputs([demo.prompt], [demo.images]))
        total = torch.zeros_like(clean)
        for start in range(0, self.trials, self.batch_size):
            copies = min(self.batch_size, self.trials - start)
            inputs = generator.inputs([demo.prompt] * copies, [demo.images] * copies)
            total += copies * vision_states(runtime, masked(runtime, inputs, self.mask_ratio, masks))
        return total / self.trials - clean


def _textual_shift(runtime: Runtime, generator: Generator, demo: Demo) -> Tensor:
    """``[L + 1, D]`` at the last token: true answer minus invented one."""
    from lmmhooks.engines.states import last_states

    gap = "" if demo.prompt[-1:].isspace() else " "
    texts = [f"{demo.prompt}{gap}{answer}" for answer in (demo.value, demo.h_value)]
    true, invented = last_states(runtime, generator.inputs(texts, [demo.images] * 2))
    return true - invented


def _stack(shifts: Sequence[Tensor]) -> Tensor:
    """``[n, L + 1, T, D]``; where images have different numbers of tokens, the mean over tokens."""
    if len({shift.shape for shift in shifts}) > 1:
        shifts = [shift.mean(dim=1, keepdim=True) for shift in shifts]
    return torch.stack(list(shifts))


def _agreement(shifts: Tensor) -> float:
    """Mean cosine of each shift with the mean of all, embeddings left out."""
    flat = shifts[:, 1:].flatten(1)
    return float(cosine_similarity(flat, flat.mean(dim=0, keepdim=True)).mean())
