"""Which methods may act on one model together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from lmmhooks.errors import MethodError
from lmmhooks.methods.attention.base import AttentionMethod
from lmmhooks.methods.attention.steering import SteeringMethod
from lmmhooks.methods.base import Method
from lmmhooks.methods.decoding.answering import AnswerMethod
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.methods.decoding.search import SearchMethod
from lmmhooks.methods.reduction.base import ReductionMethod
from lmmhooks.methods.reduction.caching import CacheMethod
from lmmhooks.methods.reduction.compute import ComputeMethod
from lmmhooks.methods.reduction.downsample import Downsample
from lmmhooks.methods.reduction.injecting import InjectionMethod
from lmmhooks.methods.reduction.tower import TowerMethod
from lmmhooks.methods.refinement.base import RefinementMethod

__all__ = ["check_composition"]


def check_composition(family: Any, present: Sequence[Method], added: Sequence[Method]) -> None:
    """
    Refuse methods that contradict each other.

    Parameters
    ----------
    family
        The model family; decides at which layers reducers act.
    present
        Methods already on the model, including those of disabled patches.
    added
        Methods about to be attached.

    Raises
    ------
    MethodError
        The same method twice, two reducers at one boundary, two decoding methods, a search of candidates beside what
        has to see the answer token by token, two that compare heads with a reading without images, key/value
        compression twice or beside edits or readings of answers' attention, images inserted twice or beside lazy
        branches, one that leaves out what another reads or edits, or a declared conflict; the text says which and what
        to do.
    """
    known: list[Method] = list(present)
    for new in added:
        for old in known:
            reason = _conflict(family, old, new)
            if reason:
                raise MethodError(f"{new.id} cannot be combined with {old.id}: {reason}; remove one of them")
        known.append(new)


def _conflict(family: Any, old: Method, new: Method) -> str | None:
    if old.is_identity or new.is_identity:
        return None
    if old.id == new.id:
        return "the same method is already on this model"
    if new.id in old.conflicts or old.id in new.conflicts:
        return old.conflicts.get(new.id) or new.conflicts[old.id]
    if all(any(isinstance(part, (DecodingMethod, SearchMethod)) for part in m.parts()) for m in (old, new)):
        return "both define the next-token logits"
    if isinstance(old, AnswerMethod) and isinstance(new, AnswerMethod):
        return "both put the answer together"
    for one, other in ((old, new), (new, old)):
        if isinstance(one, SearchMethod) and (reason := _needs_one_token(one, other)):
            return reason
    if all(any(_contrasts_text(part) for part in method.parts()) for method in (old, new)):
        return "both compare heads with a reading without images, which gets the gains of one method"
    presses = [method for method in (old, new) if isinstance(method, CacheMethod)]
    if len(presses) == 2:
        return "both compress the keys and values of the prompt"
    if presses and any(_looks_back(family, part) for method in (old, new) for part in method.parts()):
        return (
            "one edits or reads the attention that answers pay to positions of the prompt, of which the other leaves "
            "different ones to every head"
        )
    inserts = [method for method in (old, new) if isinstance(method, InjectionMethod)]
    if len(inserts) == 2:
        return "both insert images into the answer"
    if inserts and any(isinstance(part, DecodingMethod) and part.lazy for m in (old, new) for part in m.parts()):
        return "branches that run on demand read the answer without what is inserted into it; use lazy=False"
    for one, other in ((old, new), (new, old)):
        for part, beside in product(one.parts(), other.parts()):
            if isinstance(part, ComputeMethod) and (reason := _needs_left_out(family, part, beside)):
                return reason
    for one, other in ((old, new), (new, old)):
        if isinstance(one, (TowerMethod, Downsample)) and any(_reads_tower(family, part) for part in other.parts()):
            return f"{other.id} reads all patches of the vision tower, which {one.id} gives fewer"
    if isinstance(old, ReductionMethod) and isinstance(new, ReductionMethod):
        shared = {cut.layer for cut in old.cuts(family)} & {cut.layer for cut in new.cuts(family)}
        if shared:
            where = ", ".join(
                "before the decoder" if not layer else f"before layer {layer}" for layer in sorted(shared)
            )
            return f"both remove tokens {where}"
    return None


def _needs_one_token(search: Method, other: Method) -> str | None:
    """Whether a method cannot do with steps that read several next tokens and take most of them back."""
    if isinstance(other, AnswerMethod):
        return f"{other.id} asks for single tokens and drawn replies, which {search.id}, a beam search, does not give"
    if isinstance(other, InjectionMethod):
        return f"images are inserted behind the newest token, of which {search.id} reads several at once"
    if isinstance(other, CacheMethod):
        return f"{search.id} reads the attention to visual tokens, of which every head keeps different ones"
    keeps = (part for part in other.parts() if isinstance(part, AttentionMethod))
    if any(type(part).select_rows is not AttentionMethod.select_rows for part in keeps):
        return f"{other.id} remembers every token of the answer, of which {search.id} takes most back"
    return None


def _looks_back(family: Any, part: Method) -> bool:
    """Whether it edits or reads the attention of tokens that follow the prompt."""
    if isinstance(part, DecodingMethod):
        return bool(part.reads_attention(family))
    if isinstance(part, RefinementMethod):
        return bool(part.layers(family))
    return isinstance(part, AttentionMethod) and part.on_decode and bool(part.edits)


def _reads_tower(family: Any, part: Method) -> bool:
    readers = (AttentionMethod, SteeringMethod, ReductionMethod, DecodingMethod)
    return isinstance(part, readers) and any(probe.signal.startswith("vision") for probe in part.probes(family))


def _contrasts_text(part: Method) -> bool:
    return isinstance(part, AttentionMethod) and part.contrasts_text


def _needs_left_out(family: Any, compute: ComputeMethod, other: Method) -> str | None:
    """Whether a method reads, edits or computes anew what a compute method leaves out of a layer."""
    frozen = set(compute.frozen_layers(family))
    layers = frozen | set(compute.sparse_layers(family))
    if isinstance(other, ComputeMethod):
        shared = {*other.frozen_layers(family), *other.sparse_layers(family)} & layers
        if shared:
            return f"both decide what visual tokens compute in layer {min(shared)}"
    touched: set[int] = set()
    what = "reads or edits the attention of visual tokens"
    if isinstance(other, AttentionMethod):
        touched |= set(other.layers(family)) & layers if other.rows == "all" else set()
        touched |= {layer for layer, rows in other.watched(family).items() if rows == "all"} & layers
    if isinstance(other, SteeringMethod) and "edit_mlp" in other.steps:
        touched |= set(other.layers(family)) & frozen
        what = "edits what the feed-forward part makes of visual tokens"
    if isinstance(other, CacheMethod):
        touched |= layers if other.rows == "all" else set()
    if isinstance(other, ReductionMethod):
        rows = [probe.layer for probe in other.probes(family) if (probe.signal, probe.rows) == ("decoder_rows", "all")]
        touched |= set(rows) & layers
    if not touched:
        return None
    return f"{other.id} {what} in layer {min(touched)}, which {compute.id} leaves out there"
