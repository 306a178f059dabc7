"""Where the parts of a prompt are, for methods that word it anew: the question, and what the chat template writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmmhooks.errors import PromptError
from lmmhooks.methods.base import Method
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.words import surroundings

__all__ = ["Words", "are_words", "encode", "insert", "plain_words", "question_span", "with_system"]

Words = str | Sequence[int]
"""A wording: text, or token ids where no tokenizer is at hand."""


def are_words(value: Any) -> bool:
    """Whether a setting is a wording."""
    return isinstance(value, str) or (isinstance(value, tuple) and all(type(i) is int and i >= 0 for i in value))


def plain_words(value: Any) -> Any:
    """A wording as settings hold it: ids that come as a list, from a recipe say, are a tuple."""
    return tuple(value) if isinstance(value, list) else value


def encode(words: Words, context: BranchContext) -> list[int]:
    """Ids of a wording without special tokens."""
    if isinstance(words, str):
        ids: list[int] = context.tokenizer(words, add_special_tokens=False)["input_ids"]
        return ids
    return list(words)


def insert(tokens: Tensor, place: int, ids: list[int]) -> Tensor:
    """The row with some ids in front of position ``place``."""
    return torch.cat([tokens[:place], tokens.new_tensor(ids), tokens[place:]])


def question_span(tokens: Tensor, context: BranchContext, answer_prefix: int | None = None) -> tuple[int, int] | None:
    """
    The question of a row: what follows its last image, without blanks before it and what opens the answer after it.

    Parameters
    ----------
    tokens
        Long ``[n]`` with the visual tokens in it.
    context
        Of the row; without a tokenizer no blanks are seen.
    answer_prefix
        How many tokens at the end open the answer; None: those that the chat template writes there, none without one.

    Returns
    -------
    tuple or None
        Start and stop, of an empty span if the image is the end of the prompt; None for a row without images.
    """
    visual = torch.isin(tokens, torch.tensor(context.family.visual_ids, device=tokens.device)).nonzero()
    if not len(visual):
        return None
    start, stop = int(visual[-1]) + 1, len(tokens)
    ids = tokens[start:].tolist()
    head, tail = 0, 0
    if context.tokenizer is not None:
        head, tail = surroundings(context.tokenizer, ids)
        tail = tail or _template_tail(context.processor, ids)
    tail = tail if answer_prefix is None else answer_prefix
    start = min(start + head, stop)
    return start, max(stop - tail, start)


def with_system(method: Method, tokens: Tensor, text: str, context: BranchContext) -> Tensor:
    """
    The row with its system message replaced by another, or one put in where it has none.

    Parameters
    ----------
    tokens
        Long ``[n]``, as the chat template writes it: an image is the first thing the user says.
    text
        The new message.
    context
        Of the row.

    Raises
    ------
    PromptError
        The processor has no chat template with a system message, or the row does not begin as its prompts do.
    """
    first = int(torch.isin(tokens, torch.tensor(context.family.visual_ids, device=tokens.device)).nonzero()[0])
    heads = [_head(method, context, system) for system in (text, "Another message", None)]
    # What every rendering has before the image, whatever its system message, is the beginning of the user's turn.
    turn = _common_end(heads)
    if heads[0] == heads[1] or not turn or tokens[:first].tolist()[-len(turn) :] != turn:
        raise PromptError(
            f"{method.id}: the prompt before the image is not one that the processor's chat template writes with a "
            "system message; build it with processor.apply_chat_template, image first, or use place='question'"
        )
    start = [int(tokens[0])] if int(tokens[0]) == context.tokenizer.bos_token_id else []
    new = heads[0] if heads[0][:1] == start else start + heads[0]
    return torch.cat([tokens.new_tensor(new), tokens[first:]])


def _render(processor: Any, question: str, system: str | None, image: bool) -> str:
    content = [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": [{"type": "image"}, *content] if image else content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _head(method: Method, context: BranchContext, system: str | None) -> list[int]:
    """Ids of what the chat template writes before the image."""
    if getattr(context.processor, "chat_template", None) is None:
        raise PromptError(
            f"{method.id}: the processor has no chat template, so no system message; use place='question'"
        )
    ids: list[int] = context.tokenizer(_render(context.processor, "Q", system, True), add_special_tokens=False)[
        "input_ids"
    ]
    visual = context.family.visual_ids
    return ids[: next((place for place, token in enumerate(ids) if token in visual), 0)]


def _template_tail(processor: Any, ids: list[int]) -> int:
    """Tokens at the end of ``ids`` that the processor's own chat template writes after a question; 0 if it does not."""
    if getattr(processor, "chat_template", None) is None:
        return 0
    one, other = (
        processor.tokenizer(_render(processor, question, None, False), add_special_tokens=False)["input_ids"]
        for question in ("What is red", "Where?")
    )
    suffix = _common_end([one, other])
    return len(suffix) if suffix and ids[-len(suffix) :] == suffix else 0


def _common_end(rows: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all rows end with."""
    end: list[int] = []
    for column in zip(*map(reversed, rows), strict=False):
        if len(set(column)) > 1:
            break
        end.insert(0, column[0])
    return end
