"""Words of a question: which tokens carry meaning, and what a chat template writes around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from jinja2 import TemplateError

from lmmhooks.errors import MethodError

__all__ = [
    "answer_ids",
    "content_pieces",
    "content_tokens",
    "has_pronoun",
    "listed_words",
    "load_tagger",
    "question_phrases",
    "surroundings",
    "tagged_words",
    "tagger_installed",
    "token_texts",
]

Spans = list[tuple[int, int]]
"""Stretches of a text, as offsets of their first character and of the one after their last."""

TAGGER = "en_core_web_sm"
CONTENT_TAGS = frozenset({"NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"})

#: Words that stand for a thing without naming it.
PRONOUNS = """
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
we us our ours ourselves they them their theirs themselves this that these those one another
somebody someone something anybody anyone anything nobody nothing everybody everyone everything
who whom whose which what
"""

#: What questions ask for and where, which is no thing that could be looked for.
ASKED_FOR = """
image picture photo photograph color colour shape size number kind type material text word words time side position
left right top bottom above below front behind describe answer question single phrase using see
"""

#: English determiners, pronouns, prepositions, conjunctions, auxiliaries, particles and question words; parts of
#: contractions stand alone.
FUNCTION_WORDS = """
a an the this that these those each every either neither some any no all both half such
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
we us our ours ourselves they them their theirs themselves
somebody someone something anybody anyone anything nobody nothing everybody everyone everything
who whom whose which what when where why how whoever whatever whichever there here
about above across after against along among around as at before behind below beneath beside besides between
beyond by despite down during except for from in inside into like near of off on onto out outside over past per
since through throughout to toward towards under until unto up upon via with within without
and or but nor so yet if then else than because although though while whereas whether unless once
am is are was were be been being do does did doing done have has had having will would shall should can could may
might must ought isn aren wasn weren don doesn didn haven hasn hadn won wouldn shan shouldn couldn mustn ain
not n t s d m ll re ve please yes ok okay oh let
"""


def listed_words(text: str) -> Spans:
    """Words that are no English function words, by list; a substitute for a tagger that needs no model."""
    function_words = frozenset(FUNCTION_WORDS.split())
    # Bytes of a character that tokens share are decoded as U+FFFD: some letter of some script, so part of a word.
    words = re.finditer(r"(?:[^\W_]|\ufffd)+", text)
    return [word.span() for word in words if word.group().lower() not in function_words]


def question_phrases(question: str) -> list[str]:
    """
    The things a question may be about: content words that stand together, without what questions ask for.

    Only its first sentence counts; what follows usually says how to answer. A substitute where no model names them.
    """
    end = question.find("?")
    text = question if end < 0 else question[:end]
    phrases, last, asked_for = [""], 0, ASKED_FOR.split()
    for start, stop in listed_words(text):
        if text[start:stop].lower() in asked_for:
            continue
        if phrases[-1] and text[last:start].strip() == "":
            phrases[-1] += " " + text[start:stop]
        else:
            phrases.append(text[start:stop])
        last = stop
    return [phrase for phrase in phrases if phrase]


def has_pronoun(text: str, *, tagged: bool) -> bool:
    """Whether a text has a pronoun: as spaCy's small English model sees it, or by list."""
    if tagged:
        return any(word.pos_ == "PRON" for word in load_tagger()(text))
    pronouns = PRONOUNS.split()
    return any(word in pronouns for word in re.findall(r"[^\W_]+", text.lower()))


def tagger_installed() -> bool:
    """Whether `load_tagger` can be expected to succeed; loads nothing."""
    return all(find_spec(name) is not None for name in ("spacy", TAGGER))


def tagged_words(text: str) -> Spans:
    """Nouns, names, verbs, adjectives, adverbs and numbers by spaCy's small English model."""
    return [(word.idx, word.idx + len(word.text)) for word in load_tagger()(text) if word.pos_ in CONTENT_TAGS]


@lru_cache(maxsize=1)
def load_tagger() -> Any:
    """
    SpaCy's small English model, loaded once.

    Raises
    ------
    MethodError
        SpaCy or the model is not installed.
    """
    try:
        return import_module("spacy").load(TAGGER)
    except (ImportError, OSError):
        raise MethodError(
            f"tagging words needs spaCy and its model {TAGGER}, which cannot be loaded; install them with `pip install "
            f"spacy` and `python -m spacy download {TAGGER}`, or use words='content'"
        ) from None


def answer_ids(encode: Callable[[str], Sequence[int]], word: str) -> list[int]:
    """
    Tokens with which an answer of one word may begin: the word, and the word after a space, where each is one token.

    A tokenizer that splits the word gives its first token.

    Parameters
    ----------
    encode
        Text to ids, without special tokens.
    word
        Without spaces around it.
    """
    spellings = [list(encode(text)) for text in (word, f" {word}")]
    return list(dict.fromkeys(ids[0] for ids in spellings if len(ids) == 1)) or spellings[0][:1]


def content_tokens(tokenizer: Any, ids: Sequence[int], find: Callable[[str], Iterable[tuple[int, int]]]) -> list[bool]:
    """
    Which tokens belong to content words, whole or in part.

    Parameters
    ----------
    tokenizer
        That made the ids.
    ids
        Consecutive tokens of a prompt.
    find
        Text to the content words in it: `listed_words` or `tagged_words`.
    """
    return content_pieces(token_texts(tokenizer, ids), find)


def content_pieces(pieces: Sequence[str], find: Callable[[str], Iterable[tuple[int, int]]]) -> list[bool]:
    """Which pieces of a text belong to content words, whole or in part; ``find`` as in `content_tokens`."""
    spans = list(find("".join(pieces)))
    found, start = [], 0
    for piece in pieces:
        stop = start + len(piece)
        found.append(any(first < stop and start < last for first, last in spans))
        start = stop
    return found


def surroundings(tokenizer: Any, ids: Sequence[int], unknown: int = 0) -> tuple[int, int]:
    """
    How many tokens before and after a question are none of it.

    Parameters
    ----------
    tokenizer
        That made the ids.
    ids
        Text tokens of a prompt after its last image, up to where the answer begins.
    unknown
        What to answer for the end if the tokenizer has no chat template that could tell.

    Returns
    -------
    tuple
        Special and blank tokens at the start (what closes an image, line breaks); tokens at the end that the chat
        template writes there, 0 for a prompt that does not end as the template's prompts do.
    """
    pieces = token_texts(tokenizer, ids)
    head = next((place for place, piece in enumerate(pieces) if piece.strip()), len(pieces))
    suffix = _template_suffix(tokenizer)
    if not suffix:
        return head, unknown
    return head, len(suffix) if list(ids[-len(suffix) :]) == suffix else 0


def _template_suffix(tokenizer: Any) -> list[int]:
    """Tokens that the chat template writes after a question, up to where the answer begins; empty if unknown."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    # Two questions that end differently: what their prompts end with alike is the template's.
    renderings = [_render(tokenizer, question) for question in ("What is red", "Where?")]
    suffix: list[int] = []
    for one, other in zip(*map(reversed, renderings), strict=False):
        if one != other:
            break
        suffix.insert(0, one)
    return suffix


def _render(tokenizer: Any, question: str) -> list[int]:
    # Templates of multimodal models take a list of parts, those of text models a string.
    for content in ([{"type": "text", "text": question}], question):
        messages = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError):
            continue
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    return []


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the one before it; nothing for special tokens."""

    def decode(part: Sequence[int]) -> str:
        text: str = tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    # Beside its neighbour, because tokenizers drop the space before the first token they decode.
    return [
        decode(ids[place - 1 : place + 1])[len(decode(ids[place - 1 : place])) :] if place else decode(ids[:1])
        for place in range(len(ids))
    ]
