"""
What happens between the embedding of a prompt and its first decoder layer: methods compute what holds for all of it.

Passes over the unpatched decoder are run here, before any reduction, and only if a method asks for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.companion import Companion
from lmmhooks.engines.editing import Edit, RowReader
from lmmhooks.engines.passes import PlainPasses
from lmmhooks.engines.probing import Readings
from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.prompt import PromptContext

if TYPE_CHECKING:
    from lmmhooks.engines.probes import VisionProbe
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState
    from lmmhooks.family import Family
    from lmmhooks.methods.attention.steering import SteeringMethod

__all__ = ["PromptPreparer", "show_weights", "watched_beforehand", "watched_on_the_way"]


def watched_on_the_way(method: AttentionMethod, family: Family) -> Mapping[int, str]:
    """Watched layers that can be read while the prompt is read, because nothing below them depends on what is seen."""
    watched = method.watched(family)
    return watched if not watched or max(watched) < min(method.layers(family), default=0) else {}


def watched_beforehand(method: AttentionMethod, family: Family) -> Mapping[int, str]:
    """Watched layers that need a pass of their own."""
    return {} if watched_on_the_way(method, family) else method.watched(family)


def show_weights(
    family: Family,
    state: PromptState,
    method: AttentionMethod,
    layer: int,
    weights: Tensor,
    real: Tensor,
    rows: Tensor,
    edit: Edit,
) -> None:
    """Let a method see weights ``[B, H, R, N]`` of a layer it watches."""
    stage = state.stage_at(layer)
    context = AttentionContext(
        layer=layer,
        family=family,
        layout=stage.layout,
        rows=rows,
        is_prefill=True,
        memory=state.memory(method),
        prompt_length=state.layout.length,
        index=stage.index,
    )
    method.watch(weights, real, context)


class PromptPreparer:
    """
    Runs `prepare` of every method that has one, the passes that watched layers need, and starts the companion reading.

    Attributes
    ----------
    vision_probes
        What the attention engine must read for the methods.
    """

    def __init__(self, runtime: Runtime, methods: Sequence[AttentionMethod | SteeringMethod]) -> None:
        self.runtime = runtime
        family = runtime.family
        self.attention = [method for method in methods if isinstance(method, AttentionMethod)]
        self.methods = [method for method in methods if _overrides(method, "prepare")]
        probes = [probe for method in self.methods for probe in method.probes(family)]
        self.readings = Readings(runtime, probes)
        self.vision_probes: list[VisionProbe] = self.readings.vision_probes
        self.beforehand = [
            (method, watched) for method in self.attention if (watched := watched_beforehand(method, family))
        ]
        self.contrasting = sorted(
            {layer for method in self.attention if method.contrasts_text for layer in method.layers(family)}
        )

    def attach(self, attachments: Attachments) -> None:
        """Hook the decoder; must come after the hook that follows prompts and before any that shortens them."""
        self.readings.attach(attachments)
        if self.methods or self.beforehand or self.contrasting:
            attachments.pre_hook(self.runtime.family.text_model, self._enter_text, "language model (preparation)")

    def _enter_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.runtime.current
        if state is None or not state.is_prefill:
            return
        passes = PlainPasses(self.runtime, state, kwargs)
        for method in self.methods:
            method.prepare(
                PromptContext(
                    family=self.runtime.family,
                    layout=state.layout,
                    input_ids=state.input_ids,
                    embeddings=kwargs["inputs_embeds"],
                    passes=passes,
                    tokenizer=self.runtime.tokenizer,
                    memory=state.memory(method),
                    read=lambda probe: self.readings.values(probe, state, state.stages[0]),
                )
            )
        for method, watched in self.beforehand:
            listeners = {layer: self._reader(method, layer, rows, state) for layer, rows in watched.items()}
            passes.run(True, listeners, through=max(listeners))
        if self.contrasting and bool(state.layout.visual.any()):
            state.companion = Companion(self.runtime, passes, self.contrasting)

    def _reader(self, method: AttentionMethod, layer: int, rows: str, state: PromptState) -> Any:
        family = self.runtime.family
        stage = state.stages[0]

        def listener(call: AttentionCall) -> AttentionResult:
            plan = stage.rows([rows], call.query.shape[2])
            if plan is None:
                return call.run_base()
            reader = RowReader(rows, partial(show_weights, family, state, method, layer))
            return Edit(layer, family, stage, state, call).run([], [reader], plan)

        return listener


def _overrides(method: Any, name: str) -> bool:
    return any(name in vars(cls) for cls in type(method).__mro__ if "id" in vars(cls))
