"""Result files: what was measured, with command, hardware and versions, as one JSON document."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmmhooks.errors import LmmhooksError

__all__ = ["check_writable", "write_record"]


def check_writable(path: Path) -> None:
    """
    Refuse a result file that cannot be written, before anything is measured for it.

    Parameters
    ----------
    path
        The file; missing folders are made.

    Raises
    ------
    LmmhooksError
        The folder cannot be made or written to, or the path is a folder.
    """
    _write(path, None)


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """
    Write a result file, whole or not at all.

    Parameters
    ----------
    record
        JSON-compatible values.
    path
        The file; missing folders are made.

    Raises
    ------
    LmmhooksError
        The file cannot be written.
    """
    _write(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _write(path: Path, text: str | None) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text or "", encoding="utf-8")
        if text is None:
            part.unlink()
        else:
            part.replace(path)
    except OSError as error:
        raise LmmhooksError(f"cannot write {path} ({error.strerror}): choose another --out") from None
