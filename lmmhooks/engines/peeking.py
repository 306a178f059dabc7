"""Attention that rows would pay in a decoder layer which has not run yet, at the cost of its key projection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.editing import Edit
from lmmhooks.engines.rows import RowPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState, Stage

__all__ = ["peek"]


class _Seen(Exception):
    """Raised once queries and keys are known: the rest of the attention module need not run."""


def peek(
    runtime: Runtime,
    layer: int,
    hidden: Tensor,
    inputs: Mapping[str, Any],
    rows: str,
    receive: Callable[[Tensor, Tensor, Tensor, Edit], None],
) -> None:
    """
    Show the attention of some rows in a layer that is about to run.

    Parameters
    ----------
    runtime
        Of the model; the layer's attention must carry a port.
    layer
        Decoder layer, 0-based.
    hidden
        ``[B, N, D]`` what would enter it.
    inputs
        Its other arguments, for this sequence: ``position_embeddings``, ``attention_mask`` ...
    rows
        Named row selection.
    receive
        As in `RowReader`.
    """
    family, state = runtime.family, runtime.current
    assert state is not None
    stage = state.stages[-1]
    plan = stage.rows([rows], hidden.shape[1])
    if plan is None:
        return
    module = family.layers[layer]
    attention = family.attention_of(module)
    before = runtime.current, runtime.listeners
    runtime.current, runtime.listeners = None, {layer: _listener(runtime, layer, stage, state, plan, rows, receive)}
    try:
        with _only_rows(attention, plan, hidden.shape[1]):
            normed = family.attention_norm_of(module)(hidden)
            given = {name: value for name, value in inputs.items() if name not in ("past_key_values", "hidden_states")}
            attention(hidden_states=normed, **{**given, "past_key_values": None, "use_cache": False})
    except _Seen:
        pass
    finally:
        runtime.current, runtime.listeners = before


def _listener(
    runtime: Runtime, layer: int, stage: Stage, state: PromptState, plan: RowPlan, rows: str, receive: Any
) -> Callable[[AttentionCall], AttentionResult]:
    def listener(call: AttentionCall) -> AttentionResult:
        edit = Edit(layer, runtime.family, stage, state, call)
        weights, _ = edit.explicit_weights([], plan)
        receive(weights, plan.members[rows], plan.index, edit)
        raise _Seen

    return listener


@contextmanager
def _only_rows(attention: nn.Module, plan: RowPlan, length: int) -> Iterator[None]:
    """Queries of the planned rows only, the others zero, and no values: nobody looks at them."""
    query = getattr(attention, "q_proj", None)
    value = getattr(attention, "v_proj", None)
    with ExitStack() as stack:
        if isinstance(query, nn.Module):
            stack.callback(query.register_forward_pre_hook(lambda module, args: (_rows(args[0], plan.index),)).remove)
            stack.callback(query.register_forward_hook(_scatter(plan, length)).remove)
        if isinstance(value, nn.Module):
            stack.callback(value.register_forward_pre_hook(lambda module, args: (args[0][:, :1],)).remove)
            stack.callback(value.register_forward_hook(_spread(length)).remove)
        yield


def _rows(states: Tensor, index: Tensor) -> Tensor:
    return states.gather(1, index.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))


def _scatter(plan: RowPlan, length: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        full = output.new_zeros(output.shape[0], length, output.shape[-1])
        index = plan.index.to(output.device)[..., None].expand(-1, -1, output.shape[-1])
        return full.scatter(1, index, output)

    return hook


def _spread(length: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, args, output: torch.zeros_like(output).expand(-1, length, -1)
