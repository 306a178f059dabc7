"""Before any long run: a patch that does nothing must change nothing, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.errors import RunError

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["self_test"]

Tokens = Sequence[Sequence[int]]


def self_test(
    ask: Callable[[], Tokens],
    attach: Callable[[tuple[Method, ...]], Any],
    variants: Sequence[tuple[Method, ...]],
    doc_ids: Sequence[str],
) -> list[str]:
    """
    Compare greedy answers of the bare model with those under identity methods, under disabled patches and after
    removal.

    Parameters
    ----------
    ask
        Generates for the test documents and returns their tokens.
    attach
        ``lmmhooks.wrap`` bound to the model.
    variants
        The methods of every variant that the run will use.
    doc_ids
        Of the test documents, for the message.

    Returns
    -------
    list of str
        What was compared, for the record.

    Raises
    ------
    RunError
        If any token differs; names the condition, the document and the position.
    """
    expected = ask()
    compared = []
    for label, methods, disabled in _conditions(variants):
        with ExitStack() as stack:
            patch = stack.enter_context(attach(methods))
            if disabled:
                stack.enter_context(patch.disabled())
            _compare(label, expected, ask(), doc_ids)
        compared.append(label)
    if compared:
        _compare("all patches removed", expected, ask(), doc_ids)
        compared.append("all patches removed")
    return compared


def _conditions(variants: Sequence[tuple[Method, ...]]) -> Iterator[tuple[str, tuple[Method, ...], bool]]:
    from lmmhooks.methods import all_methods

    # One control per kind of method: the whole machinery of its engine, with strength zero.
    for name, cls in all_methods().items():
        if name.endswith("-identity"):
            yield name, (cls(),), False
    for methods in variants:
        yield f"{' + '.join(method.spec() for method in methods)}, disabled", methods, True


def _compare(label: str, expected: Tokens, found: Tokens, doc_ids: Sequence[str]) -> None:
    for doc_id, before, after in zip(doc_ids, expected, found, strict=True):
        if tuple(before) == tuple(after):
            continue
        pairs = zip(before, after, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
        raise RunError(
            f"self-test failed: with {label}, the answer to document {doc_id!r} differs from the bare model's at token "
            f"{position}; no figure of this run could be trusted (self_test=0 skips the test)"
        )
