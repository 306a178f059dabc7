"""
One runtime per wrapped model: the list of active patches, everything attached for them, and the state of each prompt.

The runtime is found again through the hook it keeps on the model, so that no table of models exists anywhere. Adding,
removing or disabling a patch rebuilds the attachments from the patches that remain, which makes nesting and removal in
any order the same simple operation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from lmmhooks.engines.assembly import assemble
from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.branch_cache import BranchCache
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.engines.state import PromptState, RowKeeper
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.family import Family, VisionInputs
from lmmhooks.layout import Layout, build_layout
from lmmhooks.methods.base import Method
from lmmhooks.vision import ENCODERS

if TYPE_CHECKING:
    from lmmhooks.engines.answering import AnswerEngine
    from lmmhooks.patch import Patch

__all__ = ["Runtime", "find_runtime"]


def find_runtime(model: nn.Module) -> Runtime | None:
    """The runtime of a wrapped model, or None."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Runtime):
            return owner
    return None


class Runtime:
    """Owns everything that patches attach to one model, and what they remember about its prompts."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.patches: list[Patch] = []
        self.attachments = Attachments()
        self.current: PromptState | None = None
        self.last: PromptState | None = None
        """State of the newest prompt, kept for statistics."""
        self.encoded: list[VisionInputs] = []
        """What the image encoder saw since the last prompt was read."""
        self.readings: dict[str, list[Tensor]] = {}
        """What vision probes read in the encoder call that is under way."""
        self.probes: list[DecoderProbe] = []
        """Attention read for its own sake, beside what methods need."""
        self.encoder_hook: Callable[[str, Callable[..., Any], dict[str, Any]], Any] | None = None
        """Runs the encoder instead of a plain call: decoding branches encode several variants of an image at once."""
        self.prompt_hook: Callable[[PromptState, dict[str, Any]], dict[str, Any]] | None = None
        """Changes what the decoder is given to read a prompt, before any method acts on it."""
        self.aside = False
        """Whether a forward is under way that only branches of a decoding method take part in."""
        self.answering: AnswerEngine | None = None
        """Answers prompts in the place of a plain ``generate``: a method that asks several times."""
        self.hears_first_scores: Callable[[Tensor], None] | None = None
        """Told the scores ``[B, vocabulary]`` of a first token as a decoding method makes them, before its cut."""
        self.listeners: Mapping[int, Callable[[AttentionCall], AttentionResult]] = {}
        """Decoder layers whose attention calls somebody answers while no prompt is followed."""
        self.row_keepers: list[RowKeeper] = []
        """Methods that keep something about generated tokens, which must go with the rows of the cache."""
        self.prepared: tuple[Layout, list[VisionInputs]] | None = None
        """Layout and encoder calls of the coming prompt, from an engine that made its rows itself."""
        self._states: WeakKeyDictionary[Cache, PromptState] = WeakKeyDictionary()
        self._marker: Any = None
        self._encoding = False

    @property
    def last_state(self) -> PromptState:
        """
        State of the newest prompt.

        Raises
        ------
        MethodError
            If no prompt was read since the patches last changed.
        """
        if self.last is None or not self.last.stages:
            raise MethodError("no prompt has run under this patch yet; call model.generate(...) or model(...) first")
        return self.last

    def state_of(self, cache: Any) -> PromptState | None:
        """State of the prompt that a cache holds; None for an empty one and for one that was not read here."""
        return self._states.get(cache) if isinstance(cache, Cache) and cache.get_seq_length() else None

    def adopt(self, cache: Cache, state: PromptState) -> None:
        """A cache was put together from others: this is what is known of the prompt it holds."""
        self._states[cache] = state

    # -- patches ------------------------------------------------------------------------------------------------------

    def methods(self) -> list[Method]:
        """Methods of all enabled patches, in the order in which they were given."""
        given = [m for patch in self.patches if patch.enabled for m in patch.methods if not m.is_identity]
        return [part for method in given for part in method.parts() if not part.is_identity]

    @property
    def processor(self) -> Any:
        """The newest one that was given to ``wrap``; None without one."""
        processors = [patch.processor for patch in self.patches if patch.processor is not None]
        return processors[-1] if processors else None

    @property
    def tokenizer(self) -> Any:
        """Of the newest processor that was given to ``wrap``; None without one."""
        return getattr(self.processor, "tokenizer", None)

    def refresh(self) -> None:
        """Attach exactly what the enabled patches need; nothing at all when there are none."""
        self.attachments.undo()
        self.current, self.last, self.prepared = None, None, None
        self.encoded.clear()
        self._states.clear()
        if self._marker is not None:
            self._marker.remove()
            self._marker = None
        if not self.patches:
            return
        # Stays while a patch exists, even a disabled one: it is how wrap() and unwrap() find this object.
        self._marker = self.family.model.register_forward_pre_hook(self._mark)
        methods = self.methods()
        if methods:
            try:
                assemble(self, methods)
            except BaseException:
                self.attachments.undo()
                raise

    @contextmanager
    def suspended(self) -> Iterator[Attachments]:
        """
        The model without any patch, following prompts only; probes may be attached to what is yielded.

        Everything is taken back at the end and the patches return.
        """
        self.attachments.undo()
        attachments = Attachments()
        core = self.family.core
        # M-RoPE models remember the offset of the last prompt; a generation that goes on afterwards needs its own.
        offset = getattr(core, "rope_deltas", None)
        try:
            self.follow(attachments)
            yield attachments
        finally:
            attachments.undo()
            if hasattr(core, "rope_deltas"):
                core.rope_deltas = offset
            self.refresh()

    @contextmanager
    def probing(self, probes: Sequence[DecoderProbe]) -> Iterator[None]:
        """Read attention of the patched model; needs at least one enabled patch that is no identity."""
        self.probes = list(probes)
        self.refresh()
        try:
            yield
        finally:
            self.probes = []
            self.refresh()

    @contextmanager
    def silent(self, listeners: Mapping[int, Callable[[AttentionCall], AttentionResult]]) -> Iterator[None]:
        """The model as if it were unpatched, but for attention calls of layers that are listened to."""
        before = self.current, self.listeners
        self.current, self.listeners = None, listeners
        try:
            yield
        finally:
            self.current, self.listeners = before

    def _mark(self, module: nn.Module, args: Any) -> None:
        return None

    def follow(self, attach: Attachments) -> None:
        """Attach what keeps track of prompts: needed by every engine, changes nothing by itself."""
        family = self.family
        for modality, name in ENCODERS.items():
            if hasattr(family.core, name):
                attach.attribute(family.core, name, self._watch_encoder(name, modality), f"core.{name}")
        attach.pre_hook(family.core, self._enter_core, "multimodal model")
        attach.hook(family.core, self._leave_core, "multimodal model", always=True)
        attach.pre_hook(family.text_model, self._enter_text, "language model")
        attach.hook(family.text_model, self._leave_text, "language model")

    # -- the prompt ---------------------------------------------------------------------------------------------------

    def _watch_encoder(self, name: str, modality: str) -> Callable[..., Any]:
        """The encoder method, noting what it was given: ``generate`` calls it before the loop and drops the pixels."""
        original = getattr(self.family.core, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._encoding:
                # Some models encode videos by calling their image encoder; the outer call is the one that counts.
                return original(*args, **kwargs)
            given = signature.bind_partial(*args, **kwargs).arguments
            arguments = {**given.pop("kwargs", {}), **given}
            self.readings = {}
            run = self.encoder_hook or (lambda modality, encode, arguments: encode(**arguments))
            self._encoding = True
            try:
                output = run(modality, original, arguments)
            finally:
                self._encoding = False
            vision = VisionInputs(modality, arguments, output, probes=self.readings)
            self.encoded.append(vision)
            if self.current is not None:
                # Inside the forward that reads the prompt; transformers would fail next, without naming a remedy.
                self._check_counts(self.current, [vision])
            return output

        return watched

    def _enter_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        input_ids = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        cached = int(cache.get_seq_length()) if cache is not None else 0
        if not cached:
            if input_ids is None:
                raise PromptError(
                    "the prompt was given as inputs_embeds, in which image tokens cannot be told apart; pass input_ids"
                )
            self.current = self.last = PromptState(input_ids, kwargs.get("attention_mask"))
            self._claim_encoded(self.current, kwargs.get("mm_encoder_outputs") or {})
            return None
        state = self._states.get(cache)
        if state is None:
            raise PromptError(
                f"the cache holds {cached} tokens that were not read under this patch; "
                "run the whole prompt under the patch, or start from an empty cache"
            )
        new = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        num_new = int(new.shape[1])
        if num_new > 1 and input_ids is not None and self._holds_images(input_ids):
            raise PromptError(
                f"{num_new} tokens with an image continue a cache that already holds {cached}; a patched model reads "
                "all images of a prompt in one forward: pass the whole prompt with an empty cache, without "
                "prefill_chunk_size"
            )
        state.begin_step(num_new, cached)
        self.current = self.last = state
        first = state.stages[0]
        shortened = first.removed is not None or 0 in state.pressed
        if not shortened or kwargs.get("position_ids") is not None or state.next_position is None:
            return None
        # The model would count positions from the shortened cache; continue where the full prompt ended.
        steps = torch.arange(state.grown - num_new, state.grown, device=state.next_position.device)
        return args, {**kwargs, "position_ids": state.next_position[:, None] + steps}

    def _claim_encoded(self, state: PromptState, outputs: dict[str, Any]) -> None:
        given = {modality: outputs[modality] for modality in ENCODERS if outputs.get(modality) is not None}
        for modality, output in given.items():
            seen = next((vision for vision in self.encoded if vision.output is output), None)
            state.vision.append(seen or VisionInputs(modality, {}, output))
        # Whatever is left belongs to a prompt that was never read, or will be encoded again inside this forward.
        self.encoded.clear()
        self._check_counts(state, state.vision)

    def _check_counts(self, state: PromptState, calls: Sequence[VisionInputs]) -> None:
        for call in calls:
            token = self.family.image_token_id if call.modality == "image" else self.family.video_token_id
            num_tokens = int(torch.eq(state.input_ids, -1 if token is None else token).sum())
            num_features = sum(self.family.token_counts(call))
            if num_tokens != num_features:
                raise PromptError(
                    f"the prompt has {num_tokens} {call.modality} tokens but its {call.modality}s give {num_features} "
                    f"features; write one placeholder per {call.modality} and let the model's processor expand it"
                )

    def _holds_images(self, input_ids: Tensor) -> bool:
        ids = [i for i in (self.family.image_token_id, self.family.video_token_id) if i is not None]
        return bool(torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)).any())

    def _leave_core(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.current is not None:
            self.current.companion = None
        self.current = None

    def _enter_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.current
        if state is None or not state.is_prefill:
            return None
        state.vision.extend(self.encoded)
        self.encoded.clear()
        if not state.vision and self._holds_images(state.input_ids):
            raise PromptError(
                "the prompt has image tokens but no image was given; pass pixel_values beside input_ids, as the "
                "model's processor returns them"
            )
        mask = _padding(state.attention_mask, state.num_queries)
        if self.prepared is not None:
            (layout, state.vision), self.prepared = self.prepared, None
        else:
            layout = build_layout(state.input_ids, mask, self.family, state.vision)
        state.read(layout, mask)
        state.next_position = _next_position(kwargs.get("position_ids"), layout)
        return None if self.prompt_hook is None else (args, self.prompt_hook(state, kwargs))

    def _leave_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        state = self.current
        if state is None:
            return
        for stage in state.stages:
            stage.scratch.clear()
        if state.is_prefill:
            state.vision.clear()
            cache = getattr(output, "past_key_values", None)
            cache = cache if cache is not None else kwargs.get("past_key_values")
            if isinstance(cache, Cache):
                self._states[cache] = state
                if isinstance(cache, BranchCache):
                    cache.on_select = functools.partial(self._select_rows, state)

    # -- the answer ---------------------------------------------------------------------------------------------------

    def reorder_cache(self, cache: Cache, beam_idx: Tensor) -> Cache:
        """What ``generate`` calls, on models that define it, where it would reorder the cache itself."""
        cache.reorder_cache(beam_idx)
        state = self._states.get(cache)
        if state is not None and not isinstance(cache, BranchCache):
            self._select_rows(state, beam_idx)
        return cache

    def _select_rows(self, state: PromptState, rows: Tensor) -> None:
        for method in self.row_keepers:
            method.select_rows(rows, state.memory(method))


def _padding(mask: Any, length: int) -> Tensor | None:
    """``[B, N]`` bool from the mask the model was given, None when nothing is padded."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if mask.dim() == 4:
        # Already causal (static caches): what the last query sees is what is not padded.
        last = mask[:, 0, -1, :length]
        mask = last if last.dtype == torch.bool else last == 0
    mask = mask[:, -length:].bool()
    return None if bool(mask.all()) else mask


def _next_position(position_ids: Tensor | None, layout: Any) -> Tensor:
    """``[B]`` position of the first token after the prompt in the unpatched model."""
    if position_ids is None:
        return torch.full((layout.batch,), layout.length, device=layout.segment.device)
    last = position_ids[..., -1]
    # Multi-axis positions have shape [3 or 4, B, N], the text row first when there are four.
    last = last[-3:].amax(dim=0) if last.dim() == 2 else last
    return last.expand(layout.batch) + 1
