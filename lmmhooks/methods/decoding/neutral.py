"""
Wording a leading question neutrally by rules: which characters of it lead.

Nothing is added or reordered, so that the content of the question cannot change: sentences of opinion go, and where
nothing else would be left only their opening goes; tag questions go but for their question mark.
"""

from __future__ import annotations

import re

__all__ = ["leading_spans", "neutralised", "strength"]

_SURE = (
    r"(?:i am|i'm|i feel|we are|we're) (?:very |quite |pretty |fairly |absolutely |almost )?"
    r"(?:sure|certain|confident|convinced)|(?:i|we) (?:really |already )?know"
)
_MIND = (
    r"(?:i|we) (?:(?:really|strongly|firmly|do not|don't|would|just|kind of) )?"
    r"(?:think|believe|guess|suppose|feel|bet|doubt|say|assume|suspect)|in my (?:opinion|view)|to me|if you ask me|"
    r"as far as i know"
)
_PLAIN = r"obviously|clearly|surely|of course"
_OPENING = re.compile(
    rf"(?:{_SURE}|{_MIND}|{_PLAIN})\b(?: so\b)?(?: like\b)?(?: that\b)?,?(?=\s|[.!?]|$)\s*", re.IGNORECASE
)
_TAG = re.compile(
    r",\s*(?:right|correct|yes|no|okay|ok|huh|eh|am i right|don't you (?:think|agree)(?: so)?|"
    r"(?:isn't|aren't|wasn't|weren't|doesn't|don't|didn't|hasn't|haven't|can't|won't|is|are|was|were|does|do|did|has|"
    r"have|can|will) (?:it|there|he|she|they|this|that|you|we))(?=\s*[?.!]|\s*$)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?]*[.!?]+\s*|[^.!?]+$")

#: How much a cue leads: certainty more than opinion, opinion more than a tag question. No published values.
_WEIGHTS = (
    (re.compile(rf"{_SURE}|{_PLAIN}|strongly|firmly|\bi bet\b", re.IGNORECASE), 1.0),
    (re.compile(_MIND, re.IGNORECASE), 0.7),
    (_TAG, 0.5),
)


def leading_spans(text: str) -> list[tuple[int, int]]:
    """
    What leads in a query, in order.

    Parameters
    ----------
    text
        The query, in English.

    Returns
    -------
    list of tuple
        First character and the one after the last; empty for a neutral query.
    """
    sentences = [(m.start(), m.end()) for m in _SENTENCE.finditer(text) if m.group().strip()]
    opinions = [span for span in sentences if _OPENING.match(text[span[0] : span[1]].lstrip())]
    spans = []
    for start, stop in sentences:
        sentence = text[start:stop]
        if (start, stop) in opinions:
            if len(opinions) < len(sentences):
                spans.append((start, stop))
                continue
            # Nothing else is asked: what is thought is the question.
            blank = len(sentence) - len(sentence.lstrip())
            opening = _OPENING.match(sentence, blank)
            assert opening is not None
            if sentence[opening.end() :].strip(" .!?,"):
                spans.append((start + blank, start + opening.end()))
        spans += [(start + tag.start(), start + tag.end()) for tag in _TAG.finditer(sentence)]
    # The blank before what goes at the end goes with it.
    return [(len(text[:start].rstrip()) if stop == len(text) else start, stop) for start, stop in sorted(spans)]


def neutralised(text: str) -> str:
    """The query without what leads in it; a neutral one as it is."""
    kept, cursor = [], 0
    for start, stop in leading_spans(text):
        kept.append(text[cursor:start])
        cursor = stop
    return "".join([*kept, text[cursor:]])


def strength(text: str) -> float:
    """How strongly a query leads, in [0, 1]: the strongest cue in what `leading_spans` finds; 0 for a neutral one."""
    led = [text[start:stop] for start, stop in leading_spans(text)]
    return max((weight for pattern, weight in _WEIGHTS for part in led if pattern.search(part)), default=0.0)
