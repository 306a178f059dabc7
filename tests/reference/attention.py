"""
Attention methods the slow way: the whole model runs with explicit N x N attention and no cache.

A decode step is rendered as one forward over prompt and answer so far; causality makes it the same computation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

#: (layer, weights [H, N, N] of one row of the batch, row of the batch, layer input [N, D]) -> weights
Edit = Callable[[int, Tensor, int, Tensor], Tensor]


@contextmanager
def dense_attention(model: Any, edit: Edit | None = None, *, scores: Edit | None = None, output: Edit | None = None):  # type: ignore[no-untyped-def]
    """
    Run the decoder with a full attention matrix per layer.

    ``scores`` may change logits before the mask is applied, ``edit`` the weights, ``output`` the result ``[H, N, d]``.
    """
    edit_scores, edit_output = scores, output
    inputs: dict[int, Tensor] = {}
    text = model.model.language_model

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        layer = module.layer_idx

        def edited(values: Tensor, change: Edit | None) -> Tensor:
            if change is None:
                return values
            return torch.stack([change(layer, x.clone(), row, inputs[layer][row]) for row, x in enumerate(values)])

        logits = edited(q @ k.transpose(2, 3) * kwargs["scaling"], edit_scores)
        weights = edited(torch.softmax((logits + mask[..., : k.shape[2]]).float(), dim=-1), edit)
        return edited(weights.to(v.dtype) @ v, edit_output).transpose(1, 2).contiguous(), None

    # Registered under a name of the tests; transformers has no way to take a name out again.
    AttentionInterface.register("test_dense", attend)
    AttentionMaskInterface.register("test_dense", eager_mask)
    before = text.config._attn_implementation
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: inputs.__setitem__(i, (args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        for i, layer in enumerate(text.layers)
    ]
    text.config._attn_implementation_internal = "test_dense"
    try:
        yield
    finally:
        text.config._attn_implementation_internal = before
        for hook in hooks:
            hook.remove()


def full_logits(model: Any, inputs: dict[str, Any], answer: Tensor | None = None) -> Tensor:
    """Logits ``[B, N, vocabulary]`` of a forward without cache over the prompt and ``answer [B, t]``."""
    inputs = dict(inputs)
    if answer is not None and answer.shape[1]:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(answer.shape)], dim=1)
    if (positions := positions_of(model, inputs)) is not None:
        inputs["position_ids"] = positions
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def positions_of(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Positions that ``generate`` would pass: counted over the mask; multi-axis models compute their own."""
    if hasattr(model.model, "get_rope_index"):
        return None
    return (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)


def var(p: float, rho: float, summ: float, tau: float, image_token: int, prompt_ids: Tensor, skip: set[int]) -> Edit:
    """Visual attention redistribution with channel-free sink scores, one head, row and key at a time."""
    length = prompt_ids.shape[1]

    def edit(layer: int, weights: Tensor, row: int, hidden: Tensor) -> Tensor:
        if layer in skip:
            return weights
        is_image = [bool(prompt_ids[row, j] == image_token) if j < length else False for j in range(weights.shape[-1])]
        first = is_image.index(True) if any(is_image) else None
        if first is None:
            return weights
        sinks = set()
        for j in range(length):
            if prompt_ids[row, j] == 0:  # padding
                continue
            x = hidden[j].float()
            if (x.abs() / (x.pow(2).mean() + 1e-6).sqrt()).max() > tau:
                sinks.add(j)
        visual = [j for j, image in enumerate(is_image) if image]
        rest = [j for j in visual if j not in sinks]
        if not any(j in sinks for j in visual):
            return weights
        for h in range(weights.shape[0]):
            for i in range(first, weights.shape[1]):
                if is_image[i]:
                    continue
                a = weights[h, i].clone()
                mass = sum(float(a[j]) for j in visual)
                share = sum(float(a[j]) for j in visual if j in sinks) / sum(float(a[j]) + 1e-6 for j in visual)
                target = sum(float(a[j]) for j in rest)
                if mass < summ or 1 - share < rho or target < 1e-6:
                    continue
                omega = p * sum(float(a[j]) for j in sinks)
                for j in sinks:
                    weights[h, i, j] = (1 - p) * a[j]
                for j in rest:
                    weights[h, i, j] = a[j] + omega * a[j] / target
        return weights

    return edit
