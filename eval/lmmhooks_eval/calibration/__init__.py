"""
Measuring settings on a checkpoint that need a task or demonstrations: the work behind ``lmmhooks calibrate``.

One class per kind of setting; its fields are the options of the command. What it measures becomes a record that
``wrap`` finds.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmmhooks.errors import LmmhooksError
from lmmhooks_eval import environment
from lmmhooks_eval.calibration.directions import DirectionEstimate
from lmmhooks_eval.calibration.exits import ExitSearch
from lmmhooks_eval.calibration.heads import HeadSearch
from lmmhooks_eval.calibration.layers import LayerSearch
from lmmhooks_eval.calibration.recipes import RecipeFit
from lmmhooks_eval.calibration.sinks import SinkSearch
from lmmhooks_eval.calibration.visual_heads import VisualHeadSearch
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.progress import RunProgress

if TYPE_CHECKING:
    from lmmhooks.engines.records import Record
    from lmmhooks.methods.base import Method

__all__ = ["Procedure", "calibrate", "procedure_for"]


class Procedure(Protocol):
    """How a setting is measured; a dataclass whose fields are what the user may choose."""

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[Any, dict[str, Any]]:
        """
        Value of the setting and its evidence.

        ``journal`` is a file for partial results, from which an interrupted measurement continues.
        """
        ...


_PROCEDURES: Mapping[str, type[Any]] = {
    "sink_dims": SinkSearch,
    "heads": HeadSearch,
    "directions": DirectionEstimate,
    "layers": LayerSearch,
    "yopo.heads": VisualHeadSearch,
    "dyvte.layer": ExitSearch,
    "fitprune.recipe": RecipeFit,
}
"""By name of the setting; one of a single method, by its id and name, comes first."""


def _measure_of(method: Method, name: str) -> type[Any] | None:
    return _PROCEDURES.get(f"{method.id}.{name}", _PROCEDURES.get(name))


def procedure_for(method: Method, options: Mapping[str, Any]) -> tuple[str, Procedure]:
    """
    The setting of a method that is measured, and how.

    Parameters
    ----------
    method
        The method.
    options
        What the user chose, by field name; None counts as not given.

    Raises
    ------
    LmmhooksError
        The method has nothing to measure, or an option does not apply to it.
    """
    found = [(name, kind) for name in method.calibrated if (kind := _measure_of(method, name)) is not None]
    if not found:
        raise LmmhooksError(f"{method.id} has no setting that `lmmhooks calibrate` measures; use it as it is")
    name, kind = found[0]
    fields = [field.name for field in dataclasses.fields(kind)]
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in fields:
            listed = ", ".join(f"--{field.replace('_', '-')}" for field in fields) or "no options"
            raise LmmhooksError(
                f"--{key.replace('_', '-')} does not apply to {method.id}, whose {name} are measured with {listed}"
            )
    procedure: Procedure = kind(**given)
    return name, procedure


def calibrate(
    method: Method,
    model: Any,
    processor: Any,
    options: Mapping[str, Any] | None = None,
    out: Path | None = None,
    progress: RunProgress | None = None,
) -> tuple[Record, Path]:
    """
    Measure what a method needs on a checkpoint, and keep it.

    Parameters
    ----------
    method
        Its other settings are those it is measured with.
    model, processor
        As loaded.
    options
        See `procedure_for`.
    out
        File of the record; None: where ``wrap`` looks for it.
    progress
        Told where the measurement is; silent if left out.

    Returns
    -------
    tuple
        The record and its file.

    Raises
    ------
    LmmhooksError
        For bad input, before anything is measured.
    OSError
        The file cannot be written.
    """
    from lmmhooks.engines.records import Record, record_file, write_record
    from lmmhooks.loading import identity

    name, procedure = procedure_for(method, options or {})
    checkpoint = identity(model)
    path = out or record_file(method.id, name, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = path.with_name(f"{path.stem}.partial.jsonl")
    value, found = procedure.measure(method, Generator(model, processor), journal, progress or RunProgress())
    evidence = {
        **found,
        "settings": {key: each for key, each in method.settings().items() if key != name},
        "options": dataclasses.asdict(procedure),  # type: ignore[call-overload] # a Protocol is no dataclass to mypy
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": environment.versions(),
        "date": environment.now(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    record = Record(method.id, name, checkpoint, value, evidence)
    write_record(record, path)
    journal.unlink(missing_ok=True)
    return record, path
