"""The output head of a language model, applied to states of the caller's choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .parts import LayerParts

__all__ = ["LanguageHead"]


class LanguageHead:
    """Base of `lmmhooks.family.Family`: what its head makes of states."""

    lm_head: nn.Module
    text_model: Any
    text_config: Any

    @property
    def ties_embeddings(self) -> bool:
        """Whether the head is the table of word embeddings, so that it takes an embedding back to its word."""
        return getattr(self.lm_head, "weight", None) is self.text_model.get_input_embeddings().weight

    def token_logits(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """
        What the model's head makes of states, as it does of its last ones.

        Parameters
        ----------
        states
            ``[..., D]``, after the final norm or as a method wants them.
        tokens
            Long ``[T]``, the entries of the vocabulary that are wanted; of a plain linear head, no others are computed.
            None: all.

        Returns
        -------
        Tensor
            float32 ``[..., vocabulary]``, or ``[..., T]``.
        """
        head = self.lm_head
        if tokens is not None and type(head) is nn.Linear and not head.weight.is_meta:
            tokens = tokens.to(head.weight.device)
            bias = None if head.bias is None else head.bias[tokens]
            logits = nn.functional.linear(states.to(head.weight.device), head.weight[tokens], bias).float()
        else:
            logits = LayerParts.apply(head, states).float()
            logits = logits if tokens is None else logits[..., tokens.to(logits.device)]
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)
