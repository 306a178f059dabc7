"""How a tiny model distributes attention: evidence on sinks for the model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lmmhooks_eval.tiny.evaluate import Answerer

NUM_PROMPTS = 64


@torch.no_grad()
def sink_evidence(answerer: Answerer, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Attention of the last prompt token and size of the largest activations, averaged over prompts.

    Parameters
    ----------
    answerer
        Model and processor.
    lines
        Probes; one per image is used, `NUM_PROMPTS` at most.

    Returns
    -------
    dict
        ``prefix_tokens`` (tokens before the first visual token); per layer the head means ``prefix_share``,
        ``first_token_share``, ``visual_share`` and ``top_visual_share`` (largest single visual token), all shares of
        the last token's attention in [0, 1]; ``prefix_share_by_head`` (layers x heads); ``top_visual_stability`` per
        layer (share of prompts whose top visual token is the most common one; 1/64 means no stable sink); and
        ``peak_to_median`` per layer input and token kind (prefix, visual), the largest absolute activation over the
        median absolute activation.
    """
    chosen = {line["image"]: line for line in lines}
    picked = list(chosen.values())[:NUM_PROMPTS]
    model = answerer.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # fused attention returns no weights
    sums: dict[str, torch.Tensor] = {}
    tops: list[torch.Tensor] = []
    peaks: dict[str, list[torch.Tensor]] = {"prefix": [], "visual": []}
    try:
        for line in picked:
            batch = answerer.inputs([line["question"]], [line["image"]])
            output = model(**batch, output_attentions=True, output_hidden_states=True)
            visual = batch["input_ids"][0] == model.config.image_token_id
            first = int(visual.nonzero()[0])
            rows = torch.stack([layer[0, :, -1].float() for layer in output.attentions])  # (layers, heads, N)
            shares = {
                "prefix": rows[..., :first].sum(-1),
                "first_token": rows[..., 0],
                "visual": rows[..., visual].sum(-1),
                "top_visual": rows[..., visual].mean(1, keepdim=True).amax(-1),
            }
            for name, value in shares.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(picked)
            tops.append(rows[..., visual].mean(1).argmax(-1))  # (layers,)
            states = torch.stack([state[0].float().abs() for state in output.hidden_states])
            for kind, where in (("prefix", slice(0, first)), ("visual", visual)):
                part = states[:, where].flatten(1)
                peaks[kind].append(part.amax(-1) / part.median(dim=-1).values)
    finally:
        model.set_attn_implementation(before)
    top = torch.stack(tops)
    stability = [float((top[:, layer] == top[:, layer].mode().values).float().mean()) for layer in range(top.shape[1])]
    return {
        "prompts": len(picked),
        "prefix_tokens": first,
        "prefix_share": _listed(sums["prefix"].mean(-1)),
        "first_token_share": _listed(sums["first_token"].mean(-1)),
        "visual_share": _listed(sums["visual"].mean(-1)),
        "top_visual_share": _listed(sums["top_visual"].mean(-1)),
        "prefix_share_by_head": [_listed(heads) for heads in sums["prefix"]],
        "top_visual_stability": [round(value, 3) for value in stability],
        "peak_to_median": {kind: _listed(torch.stack(values).mean(0)) for kind, values in peaks.items()},
    }


def _listed(values: torch.Tensor) -> list[float]:
    return [round(float(value), 3) for value in values]
