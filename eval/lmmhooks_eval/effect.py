"""What a patch did to a batch, in the few numbers that are stored with every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmmhooks import cost

if TYPE_CHECKING:
    from lmmhooks.engines.answering import AnswerCost

__all__ = ["Effect", "answers_effect", "dense_effect", "patch_effect", "plausibility_cut"]


@dataclass(frozen=True)
class Effect:
    """
    Reduction and theoretical cost of one batch.

    Parameters
    ----------
    visual_kept
        For every document, the visual tokens that entered each decoder layer; empty where nobody can say.
    batch
        Figures of the whole batch, as they are stored: ``batch_prefill_flops`` (decoder, theory, branches included);
        without a patch ``batch_vision_flops`` (tower, theory, None where it is not covered); under a patch
        ``batch_branches``, ``batch_branch_steps``, ``batch_cut`` (see `plausibility_cut`) and ``batch_moved``
        (attention mass moved, per layer).
    """

    visual_kept: list[list[int]]
    batch: dict[str, Any]


def dense_effect(config: Any, rows: Sequence[tuple[int, int]]) -> Effect:
    """
    The effect of no patch: every layer sees every visual token.

    Parameters
    ----------
    config
        Configuration of the model.
    rows
        (prompt tokens, visual tokens among them) of every document.
    """
    try:
        shape = cost.DecoderShape.from_config(config)
    except ValueError:
        # The theory does not cover this decoder (a mixture of experts, linear attention); the measurements stand alone.
        return Effect([[] for _ in rows], {"batch_prefill_flops": None, "batch_vision_flops": None})
    flops = sum(
        2 * cost.prefill_macs(shape, cost.dense_counts(prompt - visual, [visual] * shape.layers))
        for prompt, visual in rows
    )
    batch = {"batch_prefill_flops": flops, "batch_vision_flops": _vision_flops(config, [visual for _, visual in rows])}
    return Effect([[visual] * shape.layers for _, visual in rows], batch)


def _vision_flops(config: Any, visual: Sequence[int]) -> float | None:
    """
    Theoretical FLOPs of the tower for documents with so many visual tokens.

    Crops of a fixed size are counted as full ones, other images as one each; special tokens count as patches. Good to a
    few per cent, for the share of the prefill that reducing tokens cannot save.
    """
    try:
        tower = config.vision_config
        shape = cost.VisionShape.from_config(tower)
    except (AttributeError, ValueError):
        return None
    merge = getattr(tower, "spatial_merge_size", None) or round(1 / getattr(config, "downsample_ratio", 1))
    size, patch = (
        value[0] if isinstance(value, (list, tuple)) else value
        for value in (getattr(tower, "image_size", None), tower.patch_size)
    )
    crop = (size // patch) ** 2 if size else None
    total = 0.0
    for tokens in visual:
        patches = tokens * merge**2
        full, rest = divmod(patches, crop) if crop else (0, patches)
        total += 2 * full * cost.vision_macs(shape, crop) if crop else 0
        total += 2 * cost.vision_macs(shape, rest) if rest else 0
    return total


def patch_effect(patch: Any) -> Effect:
    """The effect of the newest prompt under an active `lmmhooks.Patch`."""
    stats = patch.stats
    by_layer = [layer.visual_kept for layer in stats.layers]
    return Effect(
        visual_kept=[list(row) for row in zip(*by_layer, strict=True)],
        batch={
            "batch_prefill_flops": stats.prefill_flops,
            "batch_branches": stats.branches,
            "batch_branch_steps": stats.branch_steps,
            "batch_cut": plausibility_cut(patch.methods),
            "batch_moved": [layer.moved for layer in stats.layers],
        },
    )


def plausibility_cut(methods: Sequence[Any]) -> float | None:
    """``beta`` of the decoding method among some methods; None without one, or if its cut is of another kind."""
    from lmmhooks.methods.decoding.base import DecodingMethod
    from lmmhooks.methods.decoding.controls import ControlOf

    for method in methods:
        inner = method.method if isinstance(method, ControlOf) else method
        if isinstance(inner, DecodingMethod) and type(inner).keep is DecodingMethod.keep:
            return inner.beta or None
    return None


def answers_effect(costs: Sequence[AnswerCost]) -> Effect:
    """The effect on answers put together from several generations: visual tokens and FLOPs of all of them."""
    known = [each.prefill_flops for each in costs if each.prefill_flops is not None]
    flops = sum(known) if len(known) == len(costs) else None
    return Effect([each.visual_kept for each in costs], {"batch_prefill_flops": flops})
