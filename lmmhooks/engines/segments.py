"""A small set of keys reweighted against all others without the attention matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmmhooks.engines.rows import MASKED, apply_weights, hide, plan_rows, row_scores, take_rows

if TYPE_CHECKING:
    from lmmhooks.engines.backend import AttentionCall
    from lmmhooks.methods.attention.base import SegmentMethod

__all__ = ["SegmentCall"]

ROW_BLOCK = 256
"""Query rows of which weights exist at once; memory is B x H' x block x N float32."""

LEAST_REST = 0.25
"""
Share of a row outside the set below which the row is computed explicitly.

The output of everything outside is what is left of the row's output once the set is taken out of it: rounding grows as
the inverse of this share.
"""


@dataclass
class SegmentCall:
    """
    A call that reads a prompt, as the query heads see it that are edited: H' of them.

    Attributes
    ----------
    call
        As many queries as keys.
    keys, values
        ``[B, Hkv, N, d]``.
    heads
        Edited query heads; None for all.
    rows_see
        Rows ``[B, R]`` to what they may see, as `lmmhooks.engines.rows.visible` returns it; the same for all heads.
    seen_by
        Keys ``[B, H', S]`` to which rows see them, as `lmmhooks.engines.rows.visible_keys` returns it.
    """

    call: AttentionCall
    keys: Tensor
    values: Tensor
    heads: Sequence[int] | None
    rows_see: Callable[[Tensor], Tensor | None]
    seen_by: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        query = self.call.query
        self.device = query.device
        self.num_heads: int = query.shape[1]
        groups = self.num_heads // self.keys.shape[1]
        every = range(self.num_heads)
        self.index = torch.tensor(list(every if self.heads is None else self.heads), device=self.device)
        self.owner = self.index // groups
        """Key head that each edited query head reads."""
        self.queries = query if self.heads is None else query[:, self.index]
        self.denominators: Tensor | None = None
        """``[B, H', N]`` log of the softmax denominator of every row, known once `received` has run."""

    def received(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """
        How much attention every key receives from the rows that can see it.

        Parameters
        ----------
        valid
            ``[B, N]`` bool, False for padding.

        Returns
        -------
        tuple
            Mean weights ``[B, H', N]`` float32, and the number of rows that see a key, ``[B, N]`` long.
        """
        keys = self._shared(self.keys)
        batch, heads, length, _ = self.queries.shape
        total = torch.zeros(batch, heads, length, device=self.device)
        seen = torch.zeros(batch, length, dtype=torch.long, device=self.device)
        denominators = []
        rows = torch.arange(length, device=self.device).expand(batch, -1)
        for start in range(0, length, ROW_BLOCK):
            stop = min(start + ROW_BLOCK, length)
            real = valid[:, start:stop]
            allowed = self.rows_see(rows[:, start:stop])
            sees = _as_bool(allowed, batch, stop - start, length, self.device) & real[..., None]
            seen += sees.sum(dim=1)
            # Rows of a decoder see few of the keys behind them: those columns need no weights.
            reach = stop if self.call.dense_mask is None else _reach(sees)
            scores = row_scores(
                self.queries[:, :, start:stop], keys[:, :, :reach], self.call.scaling, self.call.kwargs.get("softcap")
            )
            scores = hide(scores, None if allowed is None else allowed[..., :reach])
            peak = scores.amax(dim=-1, keepdim=True) if reach else scores.new_full((*scores.shape[:-1], 1), MASKED)
            weights = scores.sub_(peak).exp_()
            sums = weights.sum(dim=-1)
            denominators.append(peak[..., 0] + sums.log())
            share = real[:, None, :] / sums.clamp_min(torch.finfo(sums.dtype).tiny)
            total[..., :reach] += torch.matmul(share[:, :, None, :], weights)[:, :, 0]
        self.denominators = torch.cat(denominators, dim=-1)
        seen = seen * valid
        return total / seen[:, None].clamp(min=1), seen

    def reweight(self, output: Tensor, chosen: Tensor, method: SegmentMethod) -> tuple[Tensor, Tensor]:
        """
        ``outside * O + (inside - outside) * m * O_S`` for every row; explicit weights where that would cancel.

        Parameters
        ----------
        output
            ``[B, N, H, d]`` of the unedited call; `received` has run.
        chosen
            ``[B, H', N]`` bool: the set S of each head.
        method
            Knows the factors.

        Returns
        -------
        tuple
            The edited output, and the attention mass that moved, ``[B, N]``, mean over all heads.
        """
        assert self.denominators is not None
        most = int(chosen.sum(dim=-1).max())
        if most == 0:
            return output, torch.zeros(output.shape[:2], device=output.device)
        # Chosen keys first, in order; heads with fewer are filled up with keys that the mask below takes out again.
        index = torch.sort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True).indices[..., :most]
        member = chosen.gather(-1, index)[:, :, None, :] & self.seen_by(index)
        scores = row_scores(
            self.queries, self._pick(self.keys, index), self.call.scaling, self.call.kwargs.get("softcap")
        )
        # Rows of padding have a denominator of nothing; filling, not multiplying, keeps their infinities out.
        weights = scores.sub_(self.denominators[..., None]).exp_().masked_fill_(~member, 0)
        mass = weights.sum(dim=-1)
        rest = (1 - mass).clamp_(min=0)
        inside, outside = (factor.expand_as(mass) for factor in method.factors(mass, rest))
        # In float32 until the end: in half precision the two terms would cancel much earlier.
        of_set = torch.matmul(weights, self._pick(self.values, index).float())
        plain = output.transpose(1, 2)[:, self.index].float()
        edited = outside[..., None] * plain + (inside - outside)[..., None] * of_set
        moved = 0.5 * ((inside - 1).abs() * mass + (outside - 1).abs() * rest)
        self._correct(edited, moved, (rest < LEAST_REST).any(dim=1), chosen, method)
        result = output.clone()
        result[:, :, self.index] = edited.transpose(1, 2).to(output.dtype)
        return result, moved.sum(dim=1) / self.num_heads

    def _correct(self, edited: Tensor, moved: Tensor, tight: Tensor, chosen: Tensor, method: SegmentMethod) -> None:
        """Overwrite rows ``tight [B, N]`` of ``edited [B, H', N, d]`` and ``moved [B, H', N]`` by explicit weights."""
        plan = plan_rows({"tight": tight})
        if plan is None:
            return
        keys, values = self._shared(self.keys), self._shared(self.values)
        for start in range(0, plan.num_rows, ROW_BLOCK):
            rows = plan.index[:, start : start + ROW_BLOCK]
            scores = row_scores(take_rows(self.queries, rows), keys, self.call.scaling, self.call.kwargs.get("softcap"))
            before = torch.softmax(hide(scores, self.rows_see(rows)), dim=-1)
            after = method.reweight(before, chosen)
            exact = apply_weights(after, values).to(edited.dtype)
            distance = 0.5 * (after - before).abs().sum(dim=-1)
            # Filler rows of the plan repeat rows that exist: for them too the explicit result is the right one.
            edited.scatter_(2, rows[:, None, :, None].expand_as(exact), exact)
            moved.scatter_(2, rows[:, None, :].expand_as(distance), distance)

    def _shared(self, states: Tensor) -> Tensor:
        """Key or value states with heads that `row_scores` can deal out to the edited query heads."""
        return states if self.heads is None else states[:, self.owner]

    def _pick(self, states: Tensor, index: Tensor) -> Tensor:
        """States ``[B, H', S, d]`` at keys ``index [B, H', S]``."""
        batch = torch.arange(index.shape[0], device=self.device)[:, None, None]
        return states[batch, self.owner[None, :, None], index]


def _as_bool(allowed: Tensor | None, batch: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """``[B, R, N]`` bool from what `visible` returns; the mask must be the same for all heads."""
    if allowed is None:
        return torch.ones(batch, rows, keys, dtype=torch.bool, device=device)
    seen = allowed if allowed.dtype == torch.bool else allowed > torch.finfo(allowed.dtype).min / 2
    return seen[:, 0].expand(batch, -1, -1)


def _reach(sees: Tensor) -> int:
    """One past the last key that any row of ``sees [B, R, N]`` sees."""
    columns = sees.flatten(0, 1).any(dim=0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 0
