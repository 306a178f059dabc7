"""
What a benchmark is: documents, how to ask about them, how to read an answer, how to add up and how to resample.

A task never sees a model. Its score is a set of *sufficient statistics* per document (counts and sums that may be
added), and its metrics are a function of their totals, so that the very same code yields the reported figure, the
running figure of the progress bar and the 10,000 figures of a cluster bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lmmhooks.errors import closest
from lmmhooks_eval.errors import TaskError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks_eval.recipe import DataPlan

__all__ = ["AnswerWords", "Doc", "Metric", "Parsed", "Region", "Source", "Task", "Totals"]

Doc = Mapping[str, Any]
Totals = Mapping[str, np.ndarray]
Region = tuple[float, float, float, float]


@dataclass(frozen=True)
class Source:
    """
    Where the documents of a task come from.

    Parameters
    ----------
    kind
        ``"bundled"`` (inside the package), ``"local"`` (a folder of the user) or ``"hub"`` (a dataset id).
    id
        File name, folder or dataset id.
    revision
        What pins the content: a commit of a hub dataset, or a digest of the file.
    """

    kind: Literal["bundled", "local", "hub"]
    id: str
    revision: str | None = None


@dataclass(frozen=True)
class Metric:
    """
    One figure of a task.

    Parameters
    ----------
    name
        Key in the result of ``Task.aggregate``.
    better
        Which direction is an improvement; ``"neither"`` for figures that only describe (yes ratio, length).
    unit
        ``"share"`` is a number in [0, 1] shown in percent, ``"number"`` is shown as it is.
    proportion
        Names of the two statistics whose totals divide to this metric, if it is a plain proportion of documents: its
        interval can then be Wilson's where every cluster holds one document.
    """

    name: str
    better: Literal["higher", "lower", "neither"] = "higher"
    unit: Literal["share", "number"] = "share"
    proportion: tuple[str, str] | None = None


@dataclass(frozen=True)
class Parsed:
    """
    What a parser read from an answer.

    Parameters
    ----------
    value
        The answer in a form that JSON can hold; None if there is none.
    clean
        False for an answer that is not of the requested form, whatever value the parser's rules give it. The count of
        these is the `unparsed` column of every report.
    """

    value: Any
    clean: bool = True


@dataclass(frozen=True)
class AnswerWords:
    """
    The two words that answer a question, for tasks in which one of them is right.

    Parameters
    ----------
    positive, negative
        As the model writes them at the beginning of an answer; with and without a space before it are the same word.
    is_positive
        Whether the first is the right answer to a document.
    split
        What figures are given apart by; the same for all where there is nothing to tell apart.
    """

    positive: str
    negative: str
    is_positive: Callable[[Doc], bool]
    split: Callable[[Doc], str]


def _doc_id(doc: Doc) -> str:
    return str(doc["id"])


def _no_stratum(doc: Doc) -> str:
    return ""


@dataclass(frozen=True)
class Task:
    """
    A benchmark.

    Parameters
    ----------
    name, title, licence
        Identifier, one line for people, licence of the data.
    source
        Where the documents come from; a callable, since a digest of the file is only wanted when a run begins.
    load
        Returns every document in a fixed order. A document is a mapping with a unique ``"id"`` and values JSON can
        hold.
    images
        Opens the images of a document, in the order in which the prompt shows them. Lazily opened files are fine: sizes
        are looked at first, pixels when the document is asked.
    prompts
        Named wordings with the document's fields in braces; the first is the default.
    parsers
        Named readings of an answer, ``parse(text, doc) -> Parsed``; the first is the default.
    score
        Sufficient statistics of one document: ``{name: number}``, the same names for every document that has them;
        a missing name counts as 0.
    aggregate
        ``{metric: value}`` of their totals. Works elementwise on arrays of totals and never divides by zero.
    metrics
        The metrics `aggregate` returns; the first is the one a table leads with.
    item_score
        Name of the statistic in [0, 1] that paired tests and flips compare document by document.
    item_better
        Whether 1 in `item_score` is success (``"higher"``) or failure (``"lower"``).
    generation
        Keyword arguments of ``generate`` that the benchmark prescribes.
    cluster
        What documents share that makes their answers dependent (the image, as a rule): the unit of resampling.
    stratum
        What a limited sample keeps the proportions of.
    calibration
        Documents of the same form that are no part of the benchmark, for settings that `lmmhooks calibrate` measures;
        None if there are none. Those that carry the fields ``value`` and ``h_value``, a true answer and one with
        invented objects, are demonstrations too.
    answer_words
        For yes/no tasks: how sure the model is of its answer is stored with it, and its ranking of documents scored.
    region
        Left, top, right and bottom of where to look, in pixels of the image, for methods that are told; for a document
        about something that is not there, the place of something else. None if the task knows no places.
    target
        The box of all that a document asks about; None for one about what is not there, or in several places.
    at
        The same task on data elsewhere (a folder, another hub id); reads nothing yet. None for bundled data, which have
        one place.
    """

    name: str
    title: str
    licence: str
    source: Callable[[], Source]
    load: Callable[[], Sequence[Doc]]
    images: Callable[[Doc], Sequence[Image]]
    prompts: Mapping[str, str]
    parsers: Mapping[str, Callable[[str, Doc], Parsed]]
    score: Callable[[Any, Doc], Mapping[str, float]]
    aggregate: Callable[[Totals], Mapping[str, np.ndarray]]
    metrics: tuple[Metric, ...]
    item_score: str
    item_better: Literal["higher", "lower"] = "higher"
    generation: Mapping[str, Any] = field(default_factory=lambda: {"max_new_tokens": 16, "do_sample": False})
    cluster: Callable[[Doc], str] = _doc_id
    stratum: Callable[[Doc], str] = _no_stratum
    calibration: Callable[[], Sequence[Doc]] | None = None
    answer_words: AnswerWords | None = None
    region: Callable[[Doc], Region] | None = None
    target: Callable[[Doc], Region | None] | None = None
    at: Callable[[DataPlan], Task] | None = None

    @property
    def primary(self) -> Metric:
        """The metric a table leads with."""
        return self.metrics[0]

    def question(self, doc: Doc, prompt: str | None = None) -> str:
        """
        What is asked about one document, as plain text.

        Parameters
        ----------
        doc
            The document.
        prompt
            Name of the wording; None for the task's first.

        Raises
        ------
        TaskError
            If the wording is unknown or leaves no text to ask.
        """
        text = self._named(self.prompts, prompt, "prompt").format_map(doc)
        if not text.strip():
            raise TaskError(
                f"task {self.name!r}: the prompt of document {doc['id']!r} is empty; give its question a text"
            )
        return str(text)

    def messages(self, doc: Doc, prompt: str | None = None, system: str | None = None) -> list[dict[str, Any]]:
        """
        Chat messages that ask about one document, in the form ``processor.apply_chat_template`` takes.

        Parameters
        ----------
        doc, prompt
            As in `question`.
        system
            A system message to put before it.

        Raises
        ------
        TaskError
            As `question`.
        """
        from lmmhooks.prompting import conversation  # needs torch, which scoring and listing must not

        return conversation(len(self.images(doc)), self.question(doc, prompt), system)

    def parse(self, text: str, doc: Doc, parser: str | None = None) -> Parsed:
        """Read an answer with the named parser (None for the task's first); `TaskError` if there is no such parser."""
        return self._named(self.parsers, parser, "parser")(text, doc)

    def check(self, prompt: str | None = None, parser: str | None = None) -> None:
        """Raise `TaskError` unless the task has a wording and a parser of these names."""
        self._named(self.prompts, prompt, "prompt")
        self._named(self.parsers, parser, "parser")

    def _named(self, table: Mapping[str, Any], name: str | None, what: str) -> Any:
        if name is None:
            return next(iter(table.values()))
        if name not in table:
            raise TaskError(
                f"task {self.name!r} has no {what} {name!r}{closest(name, table)}; it has {', '.join(sorted(table))}"
            )
        return table[name]
