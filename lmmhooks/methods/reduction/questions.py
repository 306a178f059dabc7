"""The question of a prompt, for reducers that keep what it asks about."""

from __future__ import annotations

import torch
from torch import Tensor

from lmmhooks.errors import PromptError
from lmmhooks.methods.base import Method
from lmmhooks.methods.reduction.base import TokenGroup
from lmmhooks.methods.words import surroundings

__all__ = ["asked", "question_texts"]

#: What benchmarks of LLaVA append to a question about the form of its answer; released code strips both.
ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
#: How LLaVA-1.5's prompts end; its chat template is not the tokenizer's, so that it cannot be told from there.
ANSWER_BEGINS = "ASSISTANT:"


def asked(tokens: TokenGroup) -> Tensor:
    """``[B, N]`` bool: text after the first image of a row; all its text where none comes after."""
    layout = tokens.layout
    instruction = layout.instruction
    return torch.where(instruction.any(dim=1, keepdim=True), instruction, layout.valid & ~layout.visual)


def question_texts(method: Method, tokens: TokenGroup) -> list[str]:
    """
    The bare question of every row, without chat template and answer formats.

    Raises
    ------
    PromptError
        No tokenizer is known.
    """
    tokenizer = tokens.tokenizer
    if tokenizer is None:
        raise PromptError(
            f"{method.id}: reading the question needs the model's tokenizer; "
            "give its processor to wrap(model, ..., processor=processor)"
        )
    texts = []
    for row, mask in zip(tokens.input_ids.cpu(), asked(tokens).cpu(), strict=True):
        ids = row[mask].tolist()
        head, tail = surroundings(tokenizer, ids)
        text: str = tokenizer.decode(
            ids[head : len(ids) - tail], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text = text.strip().removesuffix(ANSWER_BEGINS)
        for answer_format in ANSWER_FORMATS:
            text = text.replace(answer_format, "")
        texts.append(text.strip())
    return texts
