"""
Budgets that mean the same for every method: the average number of visual tokens that enter a decoder layer.

Published labels ("192 tokens") count differently from paper to paper; FastV at its own 192 runs 204.8 on average.
`budget=` is therefore solved exactly for this average, and refused where no schedule can reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["average_visual", "solve_cut", "solve_staged", "visual_schedule"]


def visual_schedule(layers: int, visual: int, cuts: Mapping[int, int] | None = None) -> list[int]:
    """
    Visual tokens entering each layer.

    Parameters
    ----------
    layers
        Number of decoder layers.
    visual
        Visual tokens that reach the decoder.
    cuts
        Boundary (0-based; the cut happens before this layer) to the count that is left from there on.

    Returns
    -------
    list of int
        One count per layer.

    Raises
    ------
    ValueError
        A boundary outside ``[0, layers]`` or a cut that would add tokens.
    """
    cuts = dict(cuts or {})
    for boundary in cuts:
        if not 0 <= boundary <= layers:
            raise ValueError(f"cut before layer {boundary}: a decoder of {layers} layers has boundaries 0 to {layers}")
    schedule = []
    left = visual
    for layer in range(layers):
        kept = cuts.get(layer, left)
        if not 0 <= kept <= left:
            raise ValueError(f"cut before layer {layer} keeps {kept} of {left} visual tokens: give 0 to {left}")
        left = kept
        schedule.append(left)
    return schedule


def average_visual(schedule: Sequence[int]) -> float:
    """Average number of visual tokens entering a layer, the figure that budgets are stated in."""
    return sum(schedule) / len(schedule)


def solve_cut(average: float, visual: int, layers: int, boundary: int) -> int:
    """
    Tokens to keep at one cut so that the average over all layers is `average`.

    Parameters
    ----------
    average
        Wanted average of visual tokens entering a layer.
    visual
        Visual tokens that reach the decoder.
    layers
        Number of decoder layers.
    boundary
        The cut happens before this layer (0-based).

    Returns
    -------
    int
        Visual tokens kept from `boundary` on, rounded to the nearest.

    Raises
    ------
    ValueError
        The layers before the cut alone exceed the budget, or the budget exceeds what there is. The message names the
        nearest feasible average and, for a budget that is too small, the latest boundary that can reach it.
    """
    if not 0 <= boundary < layers:
        raise ValueError(f"cut before layer {boundary}: choose a boundary from 0 to {layers - 1}")
    floor = visual * boundary / layers
    if average > visual:
        raise ValueError(f"budget {average:g} exceeds the {visual} visual tokens there are: give at most {visual}")
    if average < floor:
        latest = int(average * layers / visual)
        raise ValueError(
            f"budget {average:g} cannot be met by a cut before layer {boundary}: the layers before it alone average "
            f"{floor:g}; raise the budget to {floor:g} or cut before layer {latest} or earlier"
        )
    return round((average * layers - visual * boundary) / (layers - boundary))


def solve_staged(average: float, visual: int, layers: int, boundaries: Sequence[int]) -> tuple[float, list[int]]:
    """
    The largest keep ratio for several cuts whose average over all layers does not exceed `average`.

    Before boundary j (counting from 1) ``keep_ratio**j`` of the original tokens are left.

    Parameters
    ----------
    average
        Wanted average of visual tokens entering a layer.
    visual
        Visual tokens that reach the decoder.
    layers
        Number of decoder layers.
    boundaries
        Increasing layers (0-based) before which a cut happens.

    Returns
    -------
    keep_ratio : float
        Share of the current tokens kept at every cut, in [0, 1].
    counts : list of int
        Tokens left after each cut, fractions of a token dropped. These whole numbers, not the ratio, meet the budget.

    Raises
    ------
    ValueError
        Boundaries that are empty, not increasing or outside the decoder; or an average that no ratio reaches.
    """
    if (
        not boundaries
        or list(boundaries) != sorted(set(boundaries))
        or not 0 <= boundaries[0] <= boundaries[-1] < layers
    ):
        raise ValueError(
            f"boundaries {list(boundaries)}: give increasing layers from 0 to {layers - 1}, such as [4, 12, 20]"
        )
    floor = visual * boundaries[0] / layers
    if not floor <= average <= visual:
        raise ValueError(
            f"budget {average:g} cannot be met with cuts before layers {list(boundaries)}: "
            f"feasible averages are {floor:g} to {visual}"
        )

    def counts(ratio: float) -> list[int]:
        return [int(visual * ratio**stage) for stage in range(1, len(boundaries) + 1)]

    def reached(ratio: float) -> float:
        return average_visual(visual_schedule(layers, visual, dict(zip(boundaries, counts(ratio), strict=True))))

    if reached(1.0) <= average:
        return 1.0, counts(1.0)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) <= average else (low, middle)
    return low, counts(low)
