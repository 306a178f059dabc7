"""
How a run tells where it is: nothing, or a bar on standard error with items per second, time left and the running
figure.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["BarProgress", "RunProgress"]


class RunProgress:
    """What the runner reports; this one says nothing."""

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self, total: int) -> None:
        """A run of `total` answers over all tasks and variants begins."""

    def enter(self, task: str, variant: str) -> None:
        """A pass over one task with one variant begins."""

    def advance(self, answers: int, running: str = "") -> None:
        """So many more are done; `running` is the pass's metric so far, ready to print."""

    def leave(self, task: str, variant: str, running: str) -> None:
        """The pass is over."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class BarProgress(RunProgress):
    """A live bar on a terminal; plain lines, one per pass, where standard error is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[running]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, total: int) -> None:
        self._task = self._bar.add_task("", total=total, speed="", running="")

    def enter(self, task: str, variant: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, description=f"{task} / {variant}", running="")

    def advance(self, answers: int, running: str = "") -> None:
        if self._task is None:
            return
        self._bar.update(self._task, advance=answers, running=running)
        speed = self._bar.tasks[0].speed
        self._bar.update(self._task, speed=f"{speed:.1f} items/s" if speed else "")

    def leave(self, task: str, variant: str, running: str) -> None:
        self.note(f"{task} / {variant}: {running}")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
