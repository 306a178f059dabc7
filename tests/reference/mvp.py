"""MVP the slow way: every caption, every first token and every path is a call of the untouched model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmmhooks.prompting import build_inputs


def mvp(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    *,
    instructions: Sequence[str],
    template: str,
    weights: Sequence[float],
    topk: int,
    threshold: float,
    caption_tokens: int,
    path_tokens: int,
    unknown: str = "skip",
) -> dict[str, float]:
    """Totals of Yes and No, with greedy captions and paths."""
    tokenizer = processor.tokenizer
    totals = {"Yes": 0.0, "No": 0.0}

    def greedy(inputs: dict[str, Any], number: int) -> tuple[list[int], list[torch.Tensor]]:
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=number, output_logits=True, return_dict_in_generate=True
        )
        return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), [step[0] for step in out.logits]

    for instruction, weight in zip(instructions, weights, strict=True):
        tokens, _ = greedy(build_inputs(processor, [image], instruction), caption_tokens)
        caption = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        prompt = template.format(caption=caption, question=question.lower())
        inputs = build_inputs(processor, [image], prompt)
        with torch.no_grad():
            probabilities = model(**inputs).logits[0, -1].softmax(dim=-1).tolist()
        for token in sorted(range(len(probabilities)), key=lambda v: -probabilities[v])[:topk]:
            p = probabilities[token]
            word = tokenizer.decode([token], skip_special_tokens=True).strip()
            if word in totals:
                totals[word] += weight * p
                continue
            if p < threshold:
                continue
            longer = dict(inputs)
            longer["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
            longer["attention_mask"] = torch.ones_like(longer["input_ids"])
            if "mm_token_type_ids" in inputs:
                types = inputs["mm_token_type_ids"]
                longer["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, 1)], dim=1)
            said, logits = greedy(longer, path_tokens)
            found = False
            for place in range(len(said)):
                # The shortest beginning of the reply that holds an answer word among its words.
                words = tokenizer.decode(said[: place + 1], skip_special_tokens=True).split()
                whole = tokenizer.decode(said, skip_special_tokens=True).split()
                if words and words[-1].capitalize() in totals and whole[len(words) - 1] == words[-1]:
                    first, second = logits[place].softmax(dim=-1).topk(2).values.tolist()
                    totals[words[-1].capitalize()] += weight * p * (first - second)
                    found = True
                    break
            if not found and unknown == "yes":
                totals["Yes"] += weight * p
    return totals
