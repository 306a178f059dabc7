"""
Where in an answer a variant acts, from the stored tokens: the first one or later ones, and on how many steps it could.

A method that changes the first token of a yes/no answer has decided it; one that changes captions does so somewhere
behind their beginning. Where the plausibility cut of a method leaves one token it can change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lmmhooks_eval.store import Record

__all__ = ["USUAL_CUT", "divergence", "one_token_share", "step_figures"]

USUAL_CUT = 0.1
"""The plausibility cut of most contrastive methods."""


def divergence(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any] | None:
    """
    Where answers part from the baseline's.

    Parameters
    ----------
    before, after
        Aligned lines about the same documents.

    Returns
    -------
    dict or None
        ``n``; ``first``: share of documents whose first token differs; ``later``: share whose first token is the same
        and some later one differs; ``tokens``: share of positions that hold another token, those behind the end of the
        shorter answer included. None without a document whose tokens are known on both sides.
    """
    pairs = [(a["tokens"], b["tokens"]) for a, b in zip(before, after, strict=True) if "tokens" in a and "tokens" in b]
    if not pairs:
        return None
    first = [a[:1] != b[:1] for a, b in pairs]
    later = [a != b and not at_once for (a, b), at_once in zip(pairs, first, strict=True)]
    positions = sum(max(len(a), len(b)) for a, b in pairs)
    same = sum(sum(x == y for x, y in zip(a, b, strict=False)) for a, b in pairs)
    return {
        "n": len(pairs),
        "first": sum(first) / len(pairs),
        "later": sum(later) / len(pairs),
        "tokens": 1 - same / positions if positions else 0.0,
    }


def one_token_share(records: Sequence[Record], cut: float) -> float | None:
    """
    Share of steps at which one token alone passes a plausibility cut.

    Parameters
    ----------
    records
        Lines of the baseline: a cut looks at the scores of the untouched model.
    cut
        ``beta`` in (0, 1].

    Returns
    -------
    float or None
        None where no line knows its steps (beam search, a run of an older version).
    """
    gaps = [gap for record in records for gap in record.get("gaps", ())]
    return sum(gap > -math.log(cut) for gap in gaps) / len(gaps) if gaps else None


def step_figures(reference: Sequence[Record], own: Sequence[Record]) -> dict[str, Any]:
    """
    On how many steps a variant could act.

    Parameters
    ----------
    reference
        Lines of the baseline.
    own
        Lines of the variant.

    Returns
    -------
    dict
        ``cut``: the variant's plausibility cut, None without one; ``one_token``: the share of the baseline's steps at
        which that cut leaves one token (at `USUAL_CUT` where the variant has none); ``branch_steps``: share of steps on
        which branches ran, None without a decoding method.
    """
    cut = next((record["batch_cut"] for record in own if record.get("batch_cut")), None)
    # A share of steps belongs to a batch; every answer stands for its own steps.
    ran = [(row["batch_branch_steps"], row["new_tokens"]) for row in own if row.get("batch_branch_steps") is not None]
    steps = sum(tokens for _, tokens in ran)
    return {
        "cut": cut,
        "one_token": one_token_share(reference, cut or USUAL_CUT),
        "branch_steps": sum(share * tokens for share, tokens in ran) / steps if steps else None,
    }
