"""Budgets of a prompt as tokens of its images: how many stay at every cut so that the prompt costs what it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmmhooks import cost
from lmmhooks.engines.grouping import find_groups
from lmmhooks.errors import PromptError
from lmmhooks.methods.reduction.base import BudgetUnit, Cut, ReductionMethod

if TYPE_CHECKING:
    from lmmhooks.engines.state import PromptState
    from lmmhooks.family import Family
    from lmmhooks.layout import Layout

__all__ = ["Pool", "image_targets", "share_out"]

Image = tuple[int, int]
"""Row of the batch, image."""


def image_targets(method: ReductionMethod, cut: Cut, state: PromptState, family: Family) -> dict[Image, int] | None:
    """
    Tokens left of every image after a cut, where a budget or the whole prompt decides.

    Parameters
    ----------
    method, cut
        What to do.
    state
        The prompt, about to be cut.
    family
        The model family.

    Returns
    -------
    dict or None
        By row of the batch and image; None where ``keep`` speaks for every image on its own.

    Raises
    ------
    PromptError
        The budget cannot be met; the text names the nearest one that can.
    """
    if method.counts_itself:
        return None
    if method.budget is None:
        if method.keep_per != "prompt" or not isinstance(cut.keep, int):
            return None
        return _of_prompt(cut.keep, state, method)
    plans = state.memory(method).setdefault("budget", {})
    if not plans:
        plans.update(_solve(method, state, family))
    return plans[cut.layer]


def _of_prompt(keep: int, state: PromptState, method: ReductionMethod) -> dict[Image, int]:
    targets: dict[Image, int] = {}
    for images in _candidates(state, method).values():
        shares = share_out(keep, list(images.values()))
        targets |= dict(zip(images, shares, strict=True))
    return targets


def _candidates(state: PromptState, method: ReductionMethod) -> dict[int, dict[Image, int]]:
    """Tokens of every image that may leave, by row of the batch."""
    rows: dict[int, dict[Image, int]] = {}
    for group in find_groups(state.stages[-1].layout, "image", method.newline):
        rows.setdefault(group.sample, {})[group.key[0], group.key[1]] = len(group)
    return rows


def _solve(method: ReductionMethod, state: PromptState, family: Family) -> dict[int, dict[Image, int]]:
    """Targets by layer of the cut."""
    first = min(cut.layer for cut in method.cuts(family))
    shape = cost.DecoderShape.from_config(family.text_config)
    layouts = [state.stage_at(layer).layout for layer in range(first)] + [state.stages[-1].layout]
    text = (layouts[-1].valid & ~layouts[-1].visual).sum(dim=1).tolist()
    crops = {(span.sample, span.image): max(1, len(span.tokens.grids)) for span in layouts[-1].spans}
    plans: dict[int, dict[Image, int]] = {cut.layer: {} for cut in method.cuts(family)}
    for sample, images in _candidates(state, method).items():
        entering = {key: [_tokens(layout, key) for layout in layouts] for key in images}
        if isinstance(method.budget, int) and method.keep_per != "prompt":
            # Counts are per image, so that images of different size keep equally many.
            parts = [[key] for key in images]
        else:
            parts = [list(images)]
        for part in parts:
            per_layer = [sum(column) for column in zip(*(entering[key] for key in part), strict=True)]
            *before, now = per_layer
            pool = Pool(shape, text[sample], tuple(before), now, sum(images[key] for key in part))
            budget = method.budget
            assert budget is not None
            if isinstance(budget, int) and method.keep_per == "crop":
                budget *= crops[part[0]]
            left = pool.solve(method, budget, method.budget_unit, family)
            for layer, total in left.items():
                plans[layer] |= dict(zip(part, share_out(total, [images[key] for key in part]), strict=True))
    return plans


def _tokens(layout: Layout, key: Image) -> int:
    return sum(len(span) for span in layout.spans if (span.sample, span.image) == key)


@dataclass(frozen=True)
class Pool:
    """
    Visual tokens that share a budget.

    Attributes
    ----------
    shape
        Of the decoder.
    text
        Text tokens of the prompt.
    before
        Visual tokens entering every layer before the first cut.
    now
        Visual tokens at the first cut.
    candidates
        Those of them that may leave.
    """

    shape: cost.DecoderShape
    text: int
    before: tuple[int, ...]
    now: int
    candidates: int

    def solve(self, method: ReductionMethod, budget: int | float, unit: BudgetUnit, family: Family) -> dict[int, int]:
        """Tokens left from every cut on, by its layer."""
        full = self.cost({len(self.before): self.now}, unit)
        wanted = budget if isinstance(budget, int) else budget * full
        if wanted >= full:
            return dict.fromkeys(method.shares(1.0, family), self.candidates)

        def counts(ratio: float) -> dict[int, int]:
            # Shares are exact in theory; a hair on top keeps 0.29 * 100 from becoming 28.
            return {layer: int(share * self.candidates + 1e-9) for layer, share in method.shares(ratio, family).items()}

        least = self.cost(counts(0.0), unit)
        if wanted < least:
            raise PromptError(
                f"{method.id}: budget={method.budget} ({unit}) cannot be met: layers before the first cut and the text "
                f"alone come to {_share(least, full, budget)}; give at least that, or cut earlier"
            )
        low, high = 0.0, 1.0
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(counts(middle), unit) <= wanted else (low, middle)
        best = counts(low)
        if len(best) == 1 and unit == "average":
            # One cut: the count nearest to the budget, which may lie above it by less than half a token.
            [(layer, count)] = best.items()
            above = {layer: count + 1}
            closer = self.cost(above, unit) - wanted < wanted - self.cost(best, unit)
            best = above if closer and count < self.candidates else best
        return best

    def cost(self, cuts: Mapping[int, int], unit: BudgetUnit) -> float:
        """What the prompt costs in a unit, when so many tokens are left from every cut on."""
        visual, left = [], self.now
        for layer in range(self.shape.layers):
            left = cuts.get(layer, left)
            visual.append(self.before[layer] if layer < len(self.before) else left)
        if unit == "average":
            return sum(visual) / len(visual)
        if unit == "kept":
            return visual[-1]
        if unit == "kv":
            return sum(visual) + self.text * len(visual)
        return cost.prefill_macs(self.shape, cost.dense_counts(self.text, visual))


def _share(value: float, full: float, like: int | float) -> str:
    # Rounded up: what the text names must be feasible.
    return f"{value:.6g} tokens" if isinstance(like, int) else f"{value / full + 5e-5:.4f}"


def share_out(total: int, sizes: Sequence[int]) -> list[int]:
    """
    A total in proportion to sizes, in whole numbers: rounded down, what is left to the largest fractions.

    Parameters
    ----------
    total
        At most ``sum(sizes)`` is handed out.
    sizes
        Tokens there are.
    """
    there = sum(sizes)
    if total >= there:
        return list(sizes)
    shares = [total * size // there for size in sizes]
    by_fraction = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % there), i))
    for i in by_fraction[: total - sum(shares)]:
        shares[i] += 1
    return shares
