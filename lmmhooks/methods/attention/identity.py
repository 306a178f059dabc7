"""
Attention identity: every hook of the attention engine in place, nothing edited.

A control: the output must be bit-identical to the model without lmmhooks, which shows that a measured difference comes
from a method and not from the machinery.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmmhooks.methods.attention.base import AttentionMethod

__all__ = ["AttentionIdentity"]


@dataclass(frozen=True)
class AttentionIdentity(AttentionMethod):
    """Routes the attention of every layer through lmmhooks and changes nothing."""

    id: ClassVar[str] = "attention-identity"
    paper: ClassVar[str] = "none; control"
