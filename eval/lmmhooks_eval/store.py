"""
The run folder: answers appended line by line as they are obtained, and the files made from them.

``samples.jsonl`` is only ever appended to, one line per document and variant, flushed and synced once per batch:
whatever kills the process, at most the batch in flight is lost. A torn last line is dropped on reading and cut off
before appending.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from lmmhooks_eval.errors import RunError, StoreError

__all__ = ["RunFolder", "default_folder", "differences", "read_config", "read_samples", "write_atomically"]

CONFIG, SAMPLES, METRICS, ENVIRONMENT, REPORT = (
    "config.yaml", "samples.jsonl", "metrics.json", "env.json", "report.html",
)  # fmt: skip

# What may differ between the beginning of a run and its continuation: none of it changes an answer.
_FREE_TO_CHANGE = frozenset({"batch_size", "description", "max_unparsed", "paper", "statistics"})

Record = dict[str, Any]


class RunFolder:
    """
    An open run folder.

    Parameters
    ----------
    path
        The folder; made if it does not exist.
    config
        The expanded recipe.
    resume
        Continue the run that is there. Without it, a folder that holds answers is refused.

    Raises
    ------
    StoreError
        If the folder cannot be written, holds a run and `resume` is off, or holds a run of another recipe.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self._stream: IO[bytes] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / CONFIG).exists() and _has_answers(path):
                self._continue(config, resume)
            self._stream = open(path / SAMPLES, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
            _lock(self._stream, path)
            self.write_text(CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120))
            self._cut_torn_line()
        except OSError as error:
            self.close()
            raise StoreError(
                f"run folder {path} cannot be written: {error.strerror or error}; choose another with --out"
            ) from error
        except StoreError:
            self.close()
            raise
        # Lines of failed documents are kept as history, but do not count as answered: a continued run tries again.
        self.answered = {record["key"] for record in read_samples(path) if "error" not in record}

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()
        if kind is not None and not _has_answers(self.path):
            self._discard()

    def close(self) -> None:
        """Close the file of answers; the folder stays readable."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def append(self, records: Iterable[Record]) -> None:
        """
        Write the answers of one batch and wait until the disk has them.

        Raises
        ------
        RunError
            If the disk is full or fails. Everything written before is kept, and a half-written line is removed.
        """
        if self._stream is None:
            raise RunError(f"run folder {self.path} is closed")
        batch = list(records)
        lines = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in batch)
        start = os.fstat(self._stream.fileno()).st_size
        try:
            self._write_all(lines)
            os.fsync(self._stream.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._stream.fileno(), start)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise RunError(
                f"answers cannot be written to {self.path / SAMPLES}: {reason}; earlier answers are kept, "
                f"free some space and continue with --resume"
            ) from error
        self.answered |= {record["key"] for record in batch if "error" not in record}

    def write_text(self, name: str, text: str) -> Path:
        """Replace a file of the folder in one step, so that a reader never sees half of it; returns its path."""
        return write_atomically(self.path / name, text)

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """`write_text` of indented JSON."""
        return self.write_text(name, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def _write_all(self, data: bytes) -> None:
        # An unbuffered write may stop early without an error when the disk fills up; the next one raises.
        assert self._stream is not None
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) :]

    def _continue(self, config: Mapping[str, Any], resume: bool) -> None:
        if not resume:
            raise StoreError(f"{self.path} already holds a run; continue it with --resume or choose another --out")
        differing = [line for line in differences(read_config(self.path), config) if _top(line) not in _FREE_TO_CHANGE]
        if differing:
            listed = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
            raise StoreError(f"{self.path} holds a run of another recipe ({listed}); choose another --out")

    def _discard(self) -> None:
        """Take back a folder without answers, so that a run refused for bad input leaves nothing behind."""
        with contextlib.suppress(OSError):
            for name in (CONFIG, SAMPLES, ENVIRONMENT):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()  # stays if the user keeps other things in it

    def _cut_torn_line(self) -> None:
        path = self.path / SAMPLES
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _has_answers(path: Path) -> bool:
    samples = path / SAMPLES
    return samples.exists() and samples.stat().st_size > 0


def _lock(stream: IO[bytes], path: Path) -> None:
    """Keep a second process off the run; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no advisory locks of this kind; there the user has to take care
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(f"another process is writing to {path}; wait for it or choose another --out") from error
    except OSError:
        return  # a file system without locks; the run is as safe as it was before


def default_folder(root: Path, name: str, *, resume: bool = False) -> Path:
    """
    The run folder of a recipe when the user names none.

    Parameters
    ----------
    root
        Folder that holds run folders.
    name
        Of the recipe.
    resume
        The newest existing one instead of a new one.

    Raises
    ------
    StoreError
        If there is none to resume.
    """
    if not resume:
        return root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    existing = sorted(path.parent for path in root.glob(f"{name}-[0-9]*/{CONFIG}"))
    if not existing:
        raise StoreError(f"no run of {name!r} to resume under {root}; name its folder with --out")
    return existing[-1]


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file beside its final name, sync it and rename it; returns the path."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private; results are as readable as any other file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def read_config(path: Path) -> dict[str, Any]:
    """
    The expanded recipe of a run folder.

    Raises
    ------
    StoreError
        If the folder holds none.
    """
    try:
        data = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StoreError(
            f"{path} is not a run folder: its {CONFIG} cannot be read; run `lmmhooks run` first"
        ) from error
    if not isinstance(data, dict):
        raise StoreError(f"{path} is not a run folder: its {CONFIG} is no mapping")
    return data


def read_samples(path: Path) -> list[Record]:
    """
    The answers of a run folder, in the order in which they were obtained; of several lines with one key the last
    counts.

    A torn last line is dropped. A folder without answers gives an empty list.

    Raises
    ------
    StoreError
        If a line before the last is damaged, with its number.
    """
    try:
        lines = (path / SAMPLES).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{path / SAMPLES} cannot be read: {error.strerror}") from error
    records: dict[str, Record] = {}
    # After the last newline there is either nothing or the line that was being written when the process died.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            records.pop(record["key"], None)  # so that the later line also takes the later place
            records[record["key"]] = record
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"{path / SAMPLES}: line {number} is damaged ({error}); remove it and use --resume"
            ) from error
    return list(records.values())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One ``"key.path: old -> new"`` for every leaf in which two configurations differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _MISSING) != after.get(key, _MISSING)
    ]


_MISSING = object()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value


def _top(difference: str) -> str:
    return difference.partition(":")[0].partition(".")[0]
