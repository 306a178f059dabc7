"""
Records of what was measured on a checkpoint: one small JSON each, with large tensors in a safetensors file beside it.

A record belongs to the weights it was measured on, whatever folder or hub name they were loaded from; it is refused for
any other.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmmhooks.errors import MethodError
from lmmhooks.methods.tensors import TensorSet

__all__ = ["Record", "describe_checkpoint", "read_record", "record_file", "same_checkpoint", "write_record"]

VERSION = 1


@dataclass(frozen=True)
class Record:
    """
    A setting of a method, measured.

    Attributes
    ----------
    method, field
        Id of the method, and the setting.
    checkpoint
        `lmmhooks.loading.identity` of the model.
    value
        JSON data, or a `TensorSet`.
    evidence
        JSON data: how it was measured and what was seen; ``summary`` is one line for people.
    """

    method: str
    field: str
    checkpoint: Mapping[str, Any]
    value: Any
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """What the JSON file holds, but for the name of a tensor file."""
        value = self.value.plain() if isinstance(self.value, TensorSet) else self.value
        return {
            "record": VERSION,
            "method": self.method,
            "field": self.field,
            "checkpoint": dict(self.checkpoint),
            "value": value,
            "evidence": dict(self.evidence),
        }


def same_checkpoint(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities are of the same weights: the name and the folder they came from do not matter."""
    return all(one.get(key) == other.get(key) for key in ("architecture", "parameters", "fingerprint"))


def describe_checkpoint(checkpoint: Mapping[str, Any]) -> str:
    """A checkpoint in a few words, for messages."""
    name = checkpoint.get("name") or checkpoint.get("architecture") or "unnamed"
    return f"{name} (weights {str(checkpoint.get('fingerprint'))[:12]})"


def record_file(method: str, field: str, checkpoint: Mapping[str, Any], cache: Path | None = None) -> Path:
    """
    Where a record is kept and looked for unless a path is given.

    Parameters
    ----------
    method, field, checkpoint
        As in `Record`.
    cache
        Folder of all records; None: ``~/.cache/lmmhooks``.
    """
    folder = cache or Path.home() / ".cache" / "lmmhooks"
    return folder / method / field / f"{checkpoint['fingerprint']}.json"


def write_record(record: Record, path: Path) -> None:
    """
    Write a record; folders are made, what was there is replaced as a whole.

    Raises
    ------
    OSError
        The place cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = record.plain()
    replaced = set(path.parent.glob(f"{path.stem}-*.safetensors"))
    if isinstance(record.value, TensorSet):
        from safetensors.torch import save

        # The digest in its name: a record that is being replaced never points at tensors of another one.
        tensors = path.with_name(f"{path.stem}-{record.value.digest[:12]}.safetensors")
        # Not save_file, which lets nobody but the owner read what it writes.
        content = save({name: tensor.contiguous() for name, tensor in record.value.items()})
        _replace(tensors, lambda file: file.write_bytes(content))
        data["value"] = {"file": tensors.name, **data["value"]}
        replaced.discard(tensors)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _replace(path, lambda file: file.write_text(text, encoding="utf-8"))
    for tensors in replaced:
        tensors.unlink(missing_ok=True)


def read_record(path: Path) -> Record:
    """
    Read a record.

    Raises
    ------
    MethodError
        The file is missing, no record, damaged, or its tensors are missing or not those it was written with.
    """
    remedy = "measure again with `lmmhooks calibrate`"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MethodError(f"record {path} cannot be read ({error.strerror}); check the path, or {remedy}") from None
    except ValueError:
        raise MethodError(f"record {path} is not JSON; {remedy}") from None
    if not isinstance(data, dict) or data.get("record") != VERSION:
        raise MethodError(f"{path} is no record of `lmmhooks calibrate` (version {VERSION}); {remedy}")
    try:
        record = Record(*(data[key] for key in ("method", "field", "checkpoint", "value", "evidence")))
    except KeyError as error:
        raise MethodError(f"record {path} has no {error}; {remedy}") from None
    value = record.value
    if not (isinstance(value, dict) and {"file", "digest"} <= set(value)):
        return record
    file = path.with_name(Path(str(value["file"])).name)
    tensors = _read_tensors(file)
    if tensors is None or tensors.digest != value["digest"]:
        raise MethodError(f"record {path} needs {file.name} beside it, which is missing or not its own; {remedy}")
    return Record(record.method, record.field, record.checkpoint, tensors, record.evidence)


def _read_tensors(file: Path) -> TensorSet | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return TensorSet(load_file(file))
    except (OSError, SafetensorError):
        return None


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name first: readers see the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
