"""Settings that have to be measured on a checkpoint, measured once and remembered by the checkpoint's identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks.engines.sinks import discover_sink_dims
from lmmhooks.errors import MethodError

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.methods.base import Method

__all__ = ["calibrate"]


def calibrate(
    method: Method, missing: Sequence[str], runtime: Runtime, processor: Any, cache: Path | None = None
) -> Method:
    """
    Fill settings of a method by measuring them on the model.

    Parameters
    ----------
    method
        A method some of whose `Method.calibrated` fields are None.
    missing
        Those fields.
    runtime
        Of the model; its patches are suspended while measuring.
    processor
        Used to build realistic prompts; without one, prompts are random token ids without images.
    cache
        Folder in which results are kept; default ``~/.cache/lmmhooks``.

    Raises
    ------
    MethodError
        If the model does not have what is looked for; says what was seen and what to set instead.
    """
    values = {name: _measured(name, method, runtime, processor, cache) for name in missing}
    return replace(method, **values)


def _sink_dims(method: Method, runtime: Runtime, processor: Any) -> dict[str, Any]:
    found = discover_sink_dims(runtime, processor)
    return {"value": list(found.dims), "evidence": found.evidence}


_MEASURES: dict[str, Callable[[Method, Runtime, Any], dict[str, Any]]] = {"sink_dims": _sink_dims}


def _measured(name: str, method: Method, runtime: Runtime, processor: Any, cache: Path | None) -> Any:
    from lmmhooks.loading import identity  # pulls in the auto classes, which a model in memory has no other need of

    folder = (cache or Path.home() / ".cache" / "lmmhooks") / name
    checkpoint = identity(runtime.family.model)
    digest = hashlib.sha256(json.dumps(checkpoint, sort_keys=True).encode()).hexdigest()[:24]
    file = folder / f"{digest}.json"
    record = _read(file, checkpoint)
    if record is None:
        record = {"checkpoint": checkpoint, **_MEASURES[name](method, runtime, processor)}
        _write(file, record)
    if not record["value"]:
        raise MethodError(
            f"{method.id}: {name} could not be found on this checkpoint ({record['evidence']['summary']}); "
            f"set {name} yourself, for example {name}='any' to detect sinks without fixed channels"
        )
    return tuple(record["value"])


def _read(file: Path, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("checkpoint") == checkpoint else None


def _write(file: Path, record: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(file)
    except OSError:
        # A home that cannot be written to costs a measurement next time, nothing else.
        return
