"""
Where benchmarks that are not bundled are read from: a dataset repository of the hub, or a folder with official files.

Nothing is read, let alone downloaded, before documents are asked for: listing and scoring a task need no data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.identity import digest
from lmmhooks_eval.task import Doc, Source

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "HubDataset",
    "fetch",
    "find_file",
    "hub_source",
    "image_files",
    "read_json",
    "read_json_lines",
    "refuse_repeated_ids",
    "revision_of",
]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class HubDataset:
    """
    One configuration of a dataset repository, loaded when its rows are first wanted.

    Parameters
    ----------
    task
        Name of the task, for errors.
    ids
        Dataset ids in the order they are tried, since repositories move; or one folder that mirrors a repository.
    config
        Name of the configuration; None for the repository's only one.
    columns
        What every row must have; an ``image`` among them is decoded only when it is asked for.
    revision
        Branch, tag or commit; None for the newest, whose commit is then recorded.
    """

    def __init__(
        self, task: str, ids: Sequence[str], config: str | None, columns: Sequence[str], revision: str | None
    ) -> None:
        self._task = task
        self._ids = tuple(ids)
        self._config = config
        self._columns = tuple(columns)
        self._revision = revision

    @property
    def name(self) -> str:
        """The id that was found; before anything was read, the one that is tried first."""
        return self._opened[0] if "_opened" in vars(self) else self._ids[0]

    @property
    def revision(self) -> str | None:
        """Commit of what was read; before that, what was asked for."""
        return self._opened[1] if "_opened" in vars(self) else self._revision

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows of one split without their images, in order; `TaskError` if the split or a column is missing."""
        table = self._split(split)
        return iter(table.select_columns([column for column in self._columns if column != "image"]))

    def image(self, split: str, row: int) -> Image:
        """The image of one row."""
        picture: Image = self._split(split)[row]["image"]
        return picture

    def _split(self, split: str) -> Any:
        data = self._opened[2]
        if split not in data:
            raise TaskError(
                f"task {self._task!r}: dataset {self.name} has no split {split!r}; it has {', '.join(sorted(data))}"
            )
        missing = [column for column in self._columns if column not in data[split].column_names]
        if missing:
            raise TaskError(
                f"task {self._task!r}: dataset {self.name}, split {split!r}, lacks the columns {', '.join(missing)}; "
                f"it has {', '.join(data[split].column_names)}"
            )
        return data[split]

    @cached_property
    def _opened(self) -> tuple[str, str | None, Any]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise TaskError(
                f"task {self._task!r} is read through the package datasets, which is not installed; "
                f"pip install 'lmmhooks[hub]', or name the benchmark's files with data.folder"
            ) from error
        problem = ""
        for name in self._ids:
            try:
                revision = self._commit(name)
                return name, revision, load_dataset(name, self._config, revision=revision)
            except Exception as error:
                # No network, no such repository or configuration, gated, a broken file: each layer below raises classes
                # of its own, and all of them mean that this id cannot be had.
                problem = problem or " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TaskError(
            f"task {self._task!r}: none of the datasets {', '.join(self._ids)} can be had ({problem}); "
            f"check the network, or name the benchmark's files with data.folder"
        )

    def _commit(self, name: str) -> str | None:
        """Commit hash that pins what is read; a folder has none."""
        if Path(name).is_dir():
            return None
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            return HfApi().dataset_info(name, revision=self._revision).sha
        except OfflineModeIsEnabled:
            return self._revision  # what the cache holds is all there is


def find_file(task: str, folder: str, names: Sequence[str]) -> Path:
    """The first of these files that the folder has, plain or with ``.gz``; `TaskError` naming them if it has none."""
    for name in names:
        for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
            if path.is_file():
                return path
    raise TaskError(
        f"task {task!r}: folder {folder} has no {' or '.join(names)}; put it there, or name another with data.files"
    )


def read_json(task: str, path: Path) -> Any:
    """A JSON file, compressed or not; `TaskError` if it cannot be read."""
    try:
        return json.loads(_text(path))
    except (OSError, EOFError, ValueError) as error:
        raise TaskError(f"task {task!r}: {path} cannot be read: {' '.join(str(error).split())}") from error


def read_json_lines(task: str, path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; `TaskError` with the line that is damaged or lacks one of the fields."""
    try:
        lines = _text(path).splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise TaskError(f"task {task!r}: {path} cannot be read: {' '.join(str(error).split())}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"task {task!r}: {path}, line {number}, is not JSON: {error}") from error
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise TaskError(f"task {task!r}: {path}, line {number}, lacks {', '.join(missing)}")
        rows.append(row)
    return rows


def image_files(folder: str) -> dict[str, Path]:
    """Images of a folder and of its sub-folders ``images`` and ``val2014`` by file name; the first of a name counts."""
    found: dict[str, Path] = {}
    for place in (Path(folder), Path(folder) / "images", Path(folder) / "val2014"):
        if place.is_dir():
            for path in sorted(place.iterdir()):
                if path.suffix.lower() in IMAGE_ENDINGS:
                    found.setdefault(path.name, path)
    return found


def refuse_repeated_ids(task: str, docs: Sequence[Doc]) -> Sequence[Doc]:
    """The documents, unless two have one id: an answer could then not be told from the other's."""
    seen: set[str] = set()
    for doc in docs:
        if doc["id"] in seen:
            raise TaskError(f"task {task!r}: two documents have the id {doc['id']!r}; remove one from the data")
        seen.add(doc["id"])
    return docs


def revision_of(docs: Sequence[Mapping[str, Any]]) -> str:
    """What pins documents read from files: a digest of all of them."""
    return digest([dict(doc) for doc in docs])[:16]


def fetch(url: str, sha256: str, name: str, cache: Path | None = None) -> Path:
    """
    A small published file, downloaded once and checked.

    Parameters
    ----------
    url
        Where it is, at a fixed commit.
    sha256
        Digest of its content in hexadecimal.
    name
        File name in the cache.
    cache
        Folder to keep it in; None for ``~/.cache/lmmhooks/data``.

    Raises
    ------
    TaskError
        If it cannot be downloaded, or is not the file it should be.
    """
    path = (cache or Path.home() / ".cache" / "lmmhooks" / "data") / name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content: bytes = answer.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise TaskError(f"{url} is not the file it was (its SHA-256 differs); download {name} from elsewhere")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise TaskError(
            f"{name} cannot be downloaded from {url} ({error}); get it by other means and put it in {path.parent}"
        ) from error
    return path


def hub_source(dataset: HubDataset) -> Source:
    """Source of documents that come from the hub."""
    return Source("hub", dataset.name, dataset.revision)


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
