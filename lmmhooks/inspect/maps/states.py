"""States after the final norm, from which the head makes logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["NormedStates"]


class NormedStates:
    """Keeps what comes out of the final norm, per prompt."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._seen: dict[int, tuple[PromptState, list[Tensor]]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        attachments = Attachments()
        attachments.hook(self.runtime.family.norm, self._see, "final norm (read)")
        try:
            yield
        finally:
            attachments.undo()

    def joined(self, state: PromptState) -> Tensor:
        """``[positions, D]`` of a prompt and what followed it; NaN for positions that a reduction removed."""
        prompt, *later = self._seen[id(state)][1]
        stage = state.stages[-1]
        if len(prompt) == state.layout.length:
            whole = prompt.float()
        else:
            whole = prompt.new_zeros(state.layout.length, prompt.shape[1], dtype=torch.float32)
        if stage.index is not None:
            held = stage.index[0].to(prompt.device)
            there = held[held >= 0]
            full = torch.full_like(whole, torch.nan)
            # Restored to the length of the prompt, or still short.
            full[there] = whole[there] if len(prompt) == state.layout.length else prompt[held >= 0].float()
            whole = full
        return torch.cat([whole, *(states[-1:].float() for states in later)])

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        state = self.runtime.current
        if state is not None:
            self._seen.setdefault(id(state), (state, []))[1].append(output[0].detach())
