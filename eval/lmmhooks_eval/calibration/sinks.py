"""Sink channels: measured by the toolkit itself when a model is wrapped, here on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.generate import Generator
from lmmhooks_eval.progress import RunProgress

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["SinkSearch"]


@dataclass(frozen=True)
class SinkSearch:
    """Search the channels in which attention sinks carry massive activations."""

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[Any, dict[str, Any]]:
        """Channels, and what was seen of every candidate."""
        from lmmhooks.engines.calibration import measure_at_wrap
        from lmmhooks.engines.runtime import Runtime, find_runtime
        from lmmhooks.family import resolve

        runtime = find_runtime(generator.model) or Runtime(resolve(generator.model))
        record = measure_at_wrap(method, "sink_dims", runtime, generator.processor)
        return record.value, dict(record.evidence)
