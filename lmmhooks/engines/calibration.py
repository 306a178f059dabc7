"""Settings that depend on the checkpoint: taken from records, or measured once and remembered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks.engines.records import (
    Record,
    describe_checkpoint,
    read_record,
    record_file,
    same_checkpoint,
    write_record,
)
from lmmhooks.engines.sinks import discover_sink_dims
from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method, names_record

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["calibrate_command", "fill_measured", "measure_at_wrap"]


def fill_measured(method: Method, runtime: Runtime, processor: Any, cache: Path | None = None) -> Method:
    """
    Fill the settings in `Method.calibrated` that are None or name a record.

    Parameters
    ----------
    method
        As the user gave it, published settings filled in.
    runtime
        Of the model; its patches are suspended while something is measured.
    processor
        Used to build realistic prompts; without one, prompts are random token ids without images.
    cache
        Folder in which records are kept; default ``~/.cache/lmmhooks``.

    Returns
    -------
    Method
        The very object if nothing had to be filled in.

    Raises
    ------
    MethodError
        A record is missing, damaged, or of another checkpoint or setting; or the model does not have what was looked
        for. The text names the command that measures, or what to set instead.
    """
    values = {}
    for name, moment in method.calibrated.items():
        given = getattr(method, name)
        if names_record(given):
            values[name] = _from_file(method, name, Path(given).expanduser(), runtime)
        elif given is None:
            values[name] = _from_cache(method, name, moment, runtime, processor, cache)
    return replace(method, **values) if values else method


def measure_at_wrap(method: Method, name: str, runtime: Runtime, processor: Any) -> Record:
    """
    Measure a setting that needs no task.

    Raises
    ------
    MethodError
        Nothing here knows how to measure it.
    """
    if name not in _MEASURES:
        raise MethodError(f"{method.id}: nothing measures {name}; set it yourself")
    value, evidence = _MEASURES[name](runtime, processor)
    return Record(method.id, name, _identity(runtime), value, evidence)


def calibrate_command(method: Method, runtime: Runtime, out: Path | None = None) -> str:
    """The command that measures what a method needs on this checkpoint."""
    from lmmhooks.loading import BUNDLED

    model = runtime.family.model
    source = str(getattr(model.config, "_name_or_path", "") or "FOLDER")
    name = Path(source).name
    # A record holds for the weights as loaded; in another dtype they are other weights.
    dtype = str(model.dtype).removeprefix("torch.")
    where = "" if out is None else f" --out {out}"
    return f"lmmhooks calibrate {method.id} --model {name if name in BUNDLED else source} --dtype {dtype}{where}"


def _sink_dims(runtime: Runtime, processor: Any) -> tuple[list[int], dict[str, Any]]:
    found = discover_sink_dims(runtime, processor)
    return list(found.dims), {**found.evidence, "instead": "sink_dims='any' to detect sinks without fixed channels"}


_MEASURES: Mapping[str, Callable[[Any, Any], tuple[Any, dict[str, Any]]]] = {"sink_dims": _sink_dims}


def _identity(runtime: Runtime) -> dict[str, Any]:
    from lmmhooks.loading import identity  # pulls in the auto classes, which a model in memory has no other need of

    return identity(runtime.family.model)


def _from_file(method: Method, name: str, path: Path, runtime: Runtime) -> Any:
    record = read_record(path)
    if (record.method, record.field) != (method.id, name):
        raise MethodError(f"{method.id}: {path} holds {record.field} of {record.method}, not {name} of {method.id}")
    checkpoint = _identity(runtime)
    if not same_checkpoint(record.checkpoint, checkpoint):
        raise MethodError(
            f"{method.id}: {path} was measured on {describe_checkpoint(record.checkpoint)}, this model is "
            f"{describe_checkpoint(checkpoint)}; measure it with `{calibrate_command(method, runtime, path)}`"
        )
    return _usable(method, record)


def _from_cache(method: Method, name: str, moment: str, runtime: Runtime, processor: Any, cache: Path | None) -> Any:
    checkpoint = _identity(runtime)
    path = record_file(method.id, name, checkpoint, cache)
    for place in (path, *_shipped(method, name, checkpoint, runtime)):
        # One that is damaged or of an older version counts as none.
        record = None
        with contextlib.suppress(MethodError):
            record = read_record(place)
        if record is not None and same_checkpoint(record.checkpoint, checkpoint):
            return _usable(method, record)
    if moment == "command":
        raise MethodError(
            f"{method.id}: {name} has to be measured, and was not on {describe_checkpoint(checkpoint)}; "
            f"run `{calibrate_command(method, runtime)}`, or name a record: {method.id}({name}='FILE.json')"
        )
    record = measure_at_wrap(method, name, runtime, processor)
    # A home that cannot be written to costs a measurement next time, nothing else.
    with contextlib.suppress(OSError):
        write_record(record, path)
    return _usable(method, record)


def _shipped(method: Method, name: str, checkpoint: Mapping[str, Any], runtime: Runtime) -> list[Path]:
    """Where the folder of a checkpoint may carry a record of its own."""
    source = str(getattr(runtime.family.model.config, "_name_or_path", "") or "")
    folder = Path(source)
    return [record_file(method.id, name, checkpoint, folder / "lmmhooks")] if source and folder.is_dir() else []


def _usable(method: Method, record: Record) -> Any:
    if record.value:
        return record.value
    name, summary = record.field, record.evidence.get("summary", "nothing was found")
    instead = record.evidence.get("instead")
    raise MethodError(
        f"{method.id}: {name} could not be found on this checkpoint ({summary}); set {name} yourself"
        f"{f', for example {instead}' if instead else ''}"
    )
