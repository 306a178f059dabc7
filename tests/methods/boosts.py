"""What the tests of methods that boost image logits share: naive logits of a guided answer, and a spy on the boost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmmhooks.methods.attention import boosting
from tests.reference.attention import Edit, dense_attention, full_logits


def generated(zoo: Any, inputs: dict[str, Any], steps: int = 3, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """New tokens ``[B, steps]`` and their logits ``[B, steps, vocabulary]``."""
    out = zoo.model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def naive_logits(zoo: Any, inputs: dict[str, Any], edit: Edit | None, answer: Tensor) -> Tensor:
    """Logits ``[B, t, vocabulary]`` of the tokens of an answer under a dense edit of attention scores."""
    with dense_attention(zoo.model, scores=edit):
        return full_logits(zoo.model, inputs, answer[:, :-1])[:, -answer.shape[1] :]


def image_keys(zoo: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """Positions of visual tokens, per row."""
    token = zoo.model.config.image_token_id
    return [[j for j, value in enumerate(row) if value == token] for row in inputs["input_ids"].tolist()]


def spy_on_strengths(monkeypatch: Any) -> list[Tensor]:
    """Strengths ``[B, N]`` of every call of `boost`, in order."""
    seen: list[Tensor] = []
    boost = boosting.boost

    def spying(scores: Tensor, strength: Tensor) -> Tensor:
        seen.append(strength.clone())
        return boost(scores, strength)

    monkeypatch.setattr(boosting, "boost", spying)
    return seen
