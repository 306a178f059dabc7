"""Branches that run only when they can matter: what they have not read yet, and their catching up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmmhooks.engines.branch_cache import BranchCache

__all__ = ["LazyBranches"]

#: Runs branch rows: (arguments of the caller, or tokens and the cache they continue; logits to keep) -> logits, cache.
Forward = Callable[..., tuple[Tensor, BranchCache]]


class LazyBranches:
    """
    The branches of one prompt behind the main rows' cache.

    Parameters
    ----------
    prompt
        Arguments of the forward that read the prompt in the main rows.
    num_rows
        Main rows B.
    read
        ``read(prompt, logits_to_keep)`` runs the prompt in the branch rows.
    go_on
        ``go_on(tokens [B, q], cache, logits_to_keep)`` continues them.
    """

    def __init__(self, prompt: dict[str, Any], num_rows: int, read: Forward, go_on: Forward) -> None:
        self.prompt: dict[str, Any] | None = prompt
        self.cache: BranchCache | None = None
        self.queue = prompt["input_ids"].new_empty(num_rows, 0)
        """``[B, q]`` tokens that main rows have read and branches have not."""
        self.rows: Tensor | None = None
        """Which rows of the prompt the main rows go on from; None for all, in order."""
        self.steps = 0
        self.steps_run = 0
        self._read = read
        self._go_on = go_on

    def push(self, tokens: Tensor) -> None:
        """The main rows read ``tokens [B, q]``."""
        self.queue = torch.cat([self.queue, tokens], dim=1)

    def catch_up(self, logits_to_keep: Any) -> Tensor:
        """
        Read everything the main rows have read.

        Returns
        -------
        Tensor
            ``[branches * B, k, vocabulary]`` logits of the last positions.
        """
        self.steps_run += 1
        logits: Tensor | None = None
        if self.cache is None:
            assert self.prompt is not None
            behind = self.queue.shape[1] > 0
            logits, self.cache = self._read(self.prompt, 1 if behind else logits_to_keep)
            self.prompt = None
            if self.rows is not None:
                self.cache.reorder_cache(self.rows)
        if self.queue.shape[1]:
            logits, self.cache = self._go_on(self.queue, self.cache, logits_to_keep)
            self.queue = self.queue[:, :0]
        assert logits is not None
        return logits

    def select(self, rows: Tensor) -> None:
        """The main cache goes on with these of its rows."""
        rows = rows.to(self.queue.device).long()
        self.queue = self.queue.index_select(0, rows)
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        else:
            self.rows = rows if self.rows is None else self.rows.index_select(0, rows)

    def crop(self, num_gone: int) -> None:
        """The main cache lost its last entries."""
        queued = min(num_gone, self.queue.shape[1])
        self.queue = self.queue[:, : self.queue.shape[1] - queued]
        if self.cache is not None and num_gone > queued:
            self.cache.crop(queued - num_gone)
