"""The run folder: crash-safe appending, resuming, refusing what does not belong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmmhooks_eval.errors import RunError, StoreError
from lmmhooks_eval.store import RunFolder, default_folder, differences, read_config, read_samples

CONFIG: dict[str, Any] = {"name": "r", "model": "m", "batch_size": 8, "tasks": [{"name": "t", "limit": 4}]}


def _records(*keys: str) -> list[dict[str, Any]]:
    return [{"key": key, "text": f"answer {key} ü"} for key in keys]


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "deep" / "run", CONFIG) as folder:
        folder.append(_records("a", "b"))
        assert folder.answered == {"a", "b"}
        # Readable at once and by anyone, not only after closing.
        assert [record["key"] for record in read_samples(folder.path)] == ["a", "b"]
    assert read_config(tmp_path / "deep" / "run") == CONFIG


def _begin(path: Path) -> None:
    with RunFolder(path, CONFIG) as folder:
        folder.append(_records("a"))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    _begin(tmp_path)
    with pytest.raises(StoreError, match="already holds a run; continue it with --resume"):
        RunFolder(tmp_path, CONFIG)


def test_a_run_that_never_answered_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(ValueError, match="wrong model"), RunFolder(path, CONFIG):
        raise ValueError("wrong model")
    assert not path.exists()
    _begin(path)
    with pytest.raises(ValueError, match="later"), RunFolder(path, CONFIG, resume=True):
        raise ValueError("later")
    assert [record["key"] for record in read_samples(path)] == ["a"]


def test_a_folder_without_answers_can_be_used_again(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG).close()  # as after a kill before the first answer
    RunFolder(tmp_path, {**CONFIG, "model": "n"}).close()
    assert read_config(tmp_path)["model"] == "n"


def test_resume_knows_what_is_answered(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(_records("a"))
    with RunFolder(tmp_path, CONFIG, resume=True) as folder:
        assert folder.answered == {"a"}
        folder.append(_records("b"))
    assert [record["key"] for record in read_samples(tmp_path)] == ["a", "b"]


def test_resume_refuses_another_recipe_and_says_what_differs(tmp_path: Path) -> None:
    _begin(tmp_path)
    other = {**CONFIG, "model": "n", "tasks": [{"name": "t", "limit": 5}]}
    with pytest.raises(StoreError, match=r"model: m -> n; tasks\.0\.limit: 4 -> 5"):
        RunFolder(tmp_path, other, resume=True)
    assert read_config(tmp_path) == CONFIG


def test_resume_allows_what_changes_no_answer(tmp_path: Path) -> None:
    _begin(tmp_path)
    RunFolder(tmp_path, {**CONFIG, "batch_size": 2}, resume=True).close()
    assert read_config(tmp_path)["batch_size"] == 2


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG), pytest.raises(StoreError, match="another process is writing"):
        RunFolder(tmp_path, CONFIG, resume=True)
    RunFolder(tmp_path, CONFIG, resume=True).close()


def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(_records("a"))
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes(samples.read_bytes() + b'{"key": "b", "te')
    assert [record["key"] for record in read_samples(tmp_path)] == ["a"]
    with RunFolder(tmp_path, CONFIG, resume=True) as folder:
        folder.append(_records("c"))
    assert [record["key"] for record in read_samples(tmp_path)] == ["a", "c"]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_bytes(b'{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(StoreError, match="line 2 is damaged"):
        read_samples(tmp_path)


def test_failed_documents_are_tried_again_and_the_last_line_counts(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append([{"key": "a", "error": "no image"}, *_records("b")])
        assert folder.answered == {"b"}
    with RunFolder(tmp_path, CONFIG, resume=True) as folder:
        assert folder.answered == {"b"}
        folder.append(_records("a"))
    assert [("error" in record, record["key"]) for record in read_samples(tmp_path)] == [(False, "b"), (False, "a")]


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StoreError, match=r"cannot be written.*choose another with --out"):
        RunFolder(blocked / "run", CONFIG)


class _FullDisk:
    """A stream whose disk has room for `room` more bytes: short writes, then ENOSPC, as the kernel does it."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream, self._room = stream, room

    def write(self, data: memoryview) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._stream.write(data[: self._room])
        self._room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_a_full_disk_keeps_earlier_answers_and_no_half_line(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(_records("a"))
        folder._stream = _FullDisk(folder._stream, room=20)  # type: ignore[assignment]
        with pytest.raises(RunError, match="the disk is full; earlier answers are kept"):
            folder.append(_records("b", "c"))
        assert folder.answered == {"a"}
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == 1
    assert [record["key"] for record in read_samples(tmp_path)] == ["a"]


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.write_json("metrics.json", {"a": 1})

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            folder.write_json("metrics.json", {"a": 2})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.json", "samples.jsonl"]


KILLED = """
import sys, time
from pathlib import Path
from lmmhooks_eval.store import RunFolder
with RunFolder(Path(sys.argv[1]), {"name": "r"}) as folder:
    for batch in range(100_000):
        folder.append([{"key": f"{batch}-{row}", "text": "x" * 2000} for row in range(4)])
        print(batch, flush=True)
"""


def test_kill_9_loses_at_most_the_batch_in_flight(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reported = -1
    while reported < 5:
        reported = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    last = int(rest[-1]) if rest else reported
    keys = {record["key"] for record in read_samples(tmp_path)}
    assert {f"{batch}-{row}" for batch in range(last + 1) for row in range(4)} <= keys
    with RunFolder(tmp_path, {"name": "r"}, resume=True) as folder:
        folder.append(_records("after"))
    assert read_samples(tmp_path)[-1]["key"] == "after"


def test_default_folder_is_new_or_the_newest(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run of 'r' to resume"):
        default_folder(tmp_path, "r", resume=True)
    for stamp in ("20240101-000000", "20250101-000000"):
        RunFolder(tmp_path / f"r-{stamp}", CONFIG).close()
    assert default_folder(tmp_path, "r", resume=True).name == "r-20250101-000000"
    assert (
        default_folder(tmp_path, "r").name == f"r-{time.strftime('%Y%m%d')}" + default_folder(tmp_path, "r").name[-7:]
    )


def test_differences_name_leaves() -> None:
    assert differences({"a": {"b": 1}, "c": []}, {"a": {"b": 2}, "d": None}) == [
        "a.b: 1 -> 2",
        "c: [] -> unset",
        "d: unset -> None",
    ]


def test_a_folder_without_a_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a run folder"):
        read_config(tmp_path)
    assert read_samples(tmp_path) == []
