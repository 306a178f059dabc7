"""
Compresses keys and values once a prompt has been read: fewer entries per decoder layer, other ones for every head.

The prompt runs as in the unpatched model, while the attention engine shows the weights of the rows a method scores by.
Then each layer's cache is replaced by what the method keeps. From there on layers hold caches of different length, so
every forward that continues the prompt is handed a mask of its own per layer; positions go on from the full prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.limits import refuse_caches, refuse_layers, refuse_rewound
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.engines.state import Pressed, PromptState, Stage, select_rows
from lmmhooks.methods.reduction.caching import CacheEntries, CacheMethod, Pairs

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["CacheEngine", "best_entries", "right_aligned"]

WHAT = "key/value compression"


class CacheEngine:
    """
    Attaches a method that compresses keys and values.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    methods
        Exactly one: `check_composition` refuses several.

    Attributes
    ----------
    decoder_probes
        What the attention engine must read for the method.

    Raises
    ------
    ModelError
        On construction, for decoders whose layers do not all keep every token (sliding windows).
    """

    def __init__(self, runtime: Runtime, methods: Sequence[CacheMethod]) -> None:
        self.runtime = runtime
        [self.method] = methods
        refuse_layers(runtime.family, WHAT)
        self.decoder_probes = [
            DecoderProbe(layer, self.method.rows, partial(self._hear, layer))
            for layer in range(runtime.family.num_layers)
        ]

    def attach(self, attachments: Attachments) -> None:
        """Hook the language model and every layer; must come after reducers, which hand layers masks of their own."""
        family = self.runtime.family
        attachments.pre_hook(family.text_model, self._enter_text, f"language model ({WHAT})")
        for layer, module in enumerate(family.layers):
            attachments.pre_hook(module, partial(self._enter_layer, layer), f"mask of decoder layer {layer} ({WHAT})")
            attachments.hook(module, partial(self._leave_layer, layer), f"cache of decoder layer {layer} ({WHAT})")

    # -- while the prompt is read -------------------------------------------------------------------------------------

    def _hear(self, layer: int, weights: Tensor, real: Tensor) -> None:
        state = self.runtime.current
        assert state is not None
        sums = state.memory(self).setdefault(("tallies", layer), {})
        for name, value in self.method.tally(weights, real).items():
            sums[name] = sums[name] + value if name in sums else value

    def _leave_layer(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        state, cache = self.runtime.current, kwargs.get("past_key_values")
        if state is None or not state.is_prefill or cache is None:
            return
        memory = state.memory(self)
        entries = self._entries(layer, state, cache, memory.pop(("tallies", layer), {}))
        if entries is None:
            return
        waiting = memory.setdefault("waiting", [])
        waiting.append(entries)
        if not self.method.needs_all_layers or layer == self.runtime.family.num_layers - 1:
            self._press(state, cache, memory.pop("waiting"))

    def _entries(self, layer: int, state: PromptState, cache: Any, tallies: dict[str, Tensor]) -> CacheEntries | None:
        """What a layer holds; None for prompts without an image."""
        if not any(len(span) for span in state.layout.spans):
            return None
        stage = state.stage_at(layer)
        layout, scratch = stage.layout, stage.scratch
        if "rows" not in scratch:
            # The one transfer of a stage: how much stays is decided on the host.
            valid, visual = torch.stack([layout.valid, layout.visual]).cpu()
            scratch["rows"] = tuple(visual[row][valid[row]] for row in range(layout.batch))
            scratch["read"] = select_rows(layout, self.method.rows)
        held = cache.layers[layer]
        device = held.keys.device
        return CacheEntries(
            layer=layer,
            keys=held.keys,
            values=held.values,
            valid=layout.valid.to(device),
            visual=layout.visual.to(device),
            read=scratch["read"].to(device),
            tallies=tallies,
            rows=scratch["rows"],
        )

    def _press(self, state: PromptState, cache: Any, layers: Sequence[CacheEntries]) -> None:
        for entries, wanted in zip(layers, self.method.num_keep(layers), strict=True):
            keep = [
                max(1, min(num, len(row))) if bool(row.any()) else len(row)
                for num, row in zip(wanted, entries.rows, strict=True)
            ]
            if keep == [len(row) for row in entries.rows]:
                stage: Stage = state.stage_at(entries.layer)
                state.pressed[entries.layer] = Pressed(stage.layout.length, stage.mask)
                continue
            kept, keys, values = self._kept(entries, keep)
            held = cache.layers[entries.layer]
            held.keys, held.values = keys, values
            state.pressed[entries.layer] = Pressed(max(keep), None if min(keep) == max(keep) else kept.real)

    def _kept(self, entries: CacheEntries, keep: list[int]) -> tuple[Pairs, Tensor, Tensor]:
        scores = self.method.score(entries, keep).masked_fill(~entries.valid[:, None], -torch.inf)
        chosen = best_entries(scores, keep)
        kept = _gather(entries, chosen, keep)
        gone = [len(row) - num for row, num in zip(entries.rows, keep, strict=True)]
        merged = self.method.fold(kept, _gather(entries, entries.valid[:, None] & ~chosen, gone))
        return kept, *(merged or (kept.keys, kept.values))

    # -- what follows the prompt --------------------------------------------------------------------------------------

    def _enter_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.runtime.current
        if state is None:
            return None
        if state.is_prefill:
            refuse_caches(kwargs, WHAT)
            return None
        if 0 not in state.pressed:
            return None
        positions = kwargs.get("position_ids")
        if state.num_queries > 1 and positions is not None:
            refuse_rewound(state, positions, WHAT)
        # The decoder sizes a mask by its first layer; every layer is given its own below.
        return args, {**kwargs, "attention_mask": state.pressed_mask(0)}

    def _enter_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.runtime.current
        if state is None or state.is_prefill or layer not in state.pressed:
            return None
        held, masks = state.pressed[layer], state.stages[0].scratch
        # Layers that hold the same rows share a mask.
        key = ("mask", held.length, None if held.mask is None else id(held.mask))
        if key not in masks:
            masks[key] = create_causal_mask(
                config=self.runtime.family.text_config,
                inputs_embeds=args[0] if args else kwargs["hidden_states"],
                attention_mask=state.pressed_mask(layer),
                past_key_values=kwargs.get("past_key_values"),
                position_ids=None,
                layer_idx=layer,
            )
        return args, {**kwargs, "attention_mask": masks[key]}


def best_entries(scores: Tensor, keep: Sequence[int]) -> Tensor:
    """
    Which entries stay: the best of every head, the lower index first among equals.

    Parameters
    ----------
    scores
        ``[B, Hkv, N]``, no NaN.
    keep
        How many, per row of the batch.

    Returns
    -------
    Tensor
        ``[B, Hkv, N]`` bool.
    """
    # topk breaks ties differently on every device; a stable sort does not.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranked = torch.arange(scores.shape[-1], device=scores.device) < order.new_tensor(keep)[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(2, order, ranked[:, None].expand_as(order))


def right_aligned(chosen: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """
    Where chosen entries stand, in order and at the right end.

    Parameters
    ----------
    chosen
        ``[B, Hkv, N]`` bool, the same number for every head of a row.
    counts
        That number, per row of the batch.

    Returns
    -------
    tuple
        Index ``[B, Hkv, M]`` with M the largest count, and ``[B, M]`` bool that is False for the fillers before them.
    """
    most = max(counts)
    index = chosen.to(torch.uint8).sort(dim=-1, stable=True).indices[..., chosen.shape[-1] - most :]
    real = torch.arange(most, device=chosen.device) >= most - index.new_tensor(counts)[:, None]
    return index, real


def _gather(entries: CacheEntries, chosen: Tensor, counts: Sequence[int]) -> Pairs:
    index, real = right_aligned(chosen, counts)
    at = index[..., None].expand(-1, -1, -1, entries.keys.shape[-1])
    wide = index[..., None].expand(-1, -1, -1, entries.values.shape[-1])
    return Pairs(entries.keys.gather(2, at), entries.values.gather(2, wide), real)
