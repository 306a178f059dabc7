"""
Which engines a set of methods needs, and in which order they are attached.

The order of hooks is the order of effects. Decoding branches come first, because everything below must see their rows;
then what follows prompts; then what is computed on a prompt as given; then what shortens it, before whatever looks at
the sequence a layer sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmmhooks.engines.answering import AnswerEngine
from lmmhooks.engines.attention import AttentionEngine
from lmmhooks.engines.caching import CacheEngine
from lmmhooks.engines.decoding import BranchEngine
from lmmhooks.engines.downsampling import DownsamplingEngine
from lmmhooks.engines.injection import InjectionEngine
from lmmhooks.engines.looking import LookingEngine
from lmmhooks.engines.preparing import PromptPreparer
from lmmhooks.engines.reduction import ReductionEngine
from lmmhooks.engines.searching import SearchEngine
from lmmhooks.engines.skipping import ComputeEngine
from lmmhooks.engines.steering import SteeringEngine
from lmmhooks.engines.tower import TowerEngine
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

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["assemble"]


def assemble(runtime: Runtime, methods: Sequence[Method]) -> None:
    """Attach what these methods need to the model of a runtime, and nothing else."""
    attach = runtime.attachments
    reducers = _of_kind(methods, ReductionMethod)
    branching = BranchEngine(runtime, decoders) if (decoders := _of_kind(methods, DecodingMethod)) else None
    if branching is not None:
        branching.attach(attach)
    runtime.follow(attach)
    if injecting := _of_kind(methods, InjectionMethod):
        InjectionEngine(runtime, injecting).attach(attach)
    edits, steers = _of_kind(methods, AttentionMethod), _of_kind(methods, SteeringMethod)
    runtime.row_keepers = [m for m in edits if type(m).select_rows is not AttentionMethod.select_rows]
    if branching is not None and branching.reader.keeps_rows:
        runtime.row_keepers.append(branching.reader)
    if runtime.row_keepers:
        attach.attribute(runtime.family.model, "_reorder_cache", runtime.reorder_cache, "model._reorder_cache")
    preparer = PromptPreparer(runtime, [*edits, *steers])
    # Before the reduction engine: what holds for a prompt is computed on the prompt as given.
    preparer.attach(attach)
    if smaller := _of_kind(reducers, Downsample):
        DownsamplingEngine(runtime, smaller[0]).attach(attach)
    # Before the attention engine: an observer of layer k must see the sequence that layer k sees.
    reduction = ReductionEngine(runtime, reducers)
    reduction.attach(attach)
    caching = CacheEngine(runtime, presses) if (presses := _of_kind(methods, CacheMethod)) else None
    if caching is not None:
        caching.attach(attach)
    # Before the steering engine: what it sees of a feed-forward part has the length of the prompt.
    compute = ComputeEngine(runtime, _of_kind(methods, ComputeMethod))
    compute.attach(attach)
    if branching is not None:
        # After whatever shortens the sequence.
        branching.stacker.shown.readings.attach(attach)
    searching = SearchEngine(runtime, searches) if (searches := _of_kind(methods, SearchMethod)) else None
    if searching is not None:
        # After whatever hands layers masks of their own.
        searching.attach(attach)
    answerers = _of_kind(methods, AnswerMethod)
    looking = LookingEngine(runtime, looks) if (looks := _of_kind(answerers, RefinementMethod)) else None
    AttentionEngine(
        runtime,
        edits,
        [
            *runtime.probes,
            *reduction.decoder_probes,
            *(caching.decoder_probes if caching else ()),
            *((*branching.reader.probes, *branching.prompt_reader.probes) if branching else ()),
            *([searching.siblings.probe] if searching else ()),
            *(looking.decoder_probes if looking else ()),
        ],
        [
            *preparer.vision_probes,
            *reduction.vision_probes,
            *(branching.stacker.shown.readings.vision_probes if branching else ()),
        ],
        {*reduction.peeked, *(looking.listened if looking else ())},
        compute,
        branching.attender if branching else None,
    ).attach(attach)
    SteeringEngine(runtime, steers).attach(attach)
    if branching is not None:
        # After whatever shortens or steers states: those that the head reads are seen, counted from the end.
        branching.reader.attach(attach)
    if answerers:
        # Last but the tower: nothing may stand between passes and the forward that reads what is left of a prompt.
        (looking or AnswerEngine(runtime, answerers)).attach(attach)
    if inside := _of_kind(reducers, TowerMethod):
        # Last: it takes the place of what other hooks on the MLPs of the tower edit.
        TowerEngine(runtime, inside[0]).attach(attach)


def _of_kind(methods: Sequence[Method], kind: type[Any]) -> list[Any]:
    """Those methods that follow one contract, in order."""
    return [method for method in methods if isinstance(method, kind)]
