"""
Passes over the same image read it once: its features, and the keys and values of everything up to where prompts part.

A position's keys and values depend on what stands before it alone, so that a pass whose prompt begins like that of an
earlier pass takes them from there and reads the rest. Everything above the decoder (``generate``, positions, the layout
of the prompt) sees the whole prompt, and everything below sees what it would see in a prompt that continues a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.branch_vision import Entry, entries_of, with_entries
from lmmhooks.engines.prefix_sharing import can_share
from lmmhooks.engines.state import PromptState
from lmmhooks.vision import PIXELS

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["Picture", "ReadOnce"]

#: Prompts whose keys and values are kept: of the image in front of the model, and of what was made of it last.
NUM_KEPT = 2
#: Images whose features are kept, the newest ones; a search may show hundreds of crops.
NUM_ENCODED = 16
#: Arguments of a language model that are understood, and can be cut where prompts part.
_CUT = ("inputs_embeds", "attention_mask", "position_ids", "cache_position", "visual_pos_masks")


@dataclass(eq=False)
class Picture:
    """
    An image of a pass.

    Attributes
    ----------
    digest
        Names its pixels.
    process
        Returns what the processor makes of it alone; called at most once.
    offset
        ``[n, D]`` added to its embeddings, None for nothing; such an image shares no reading with others.
    """

    digest: bytes
    process: Callable[[], dict[str, Any]]
    offset: Tensor | None = None

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """What the processor makes of it alone."""
        return self.process()


@dataclass(eq=False)
class _Encoded:
    """An image that was encoded: how many rows of pixels it has, an output that holds nothing else, and its entries."""

    num_rows: int
    output: Any
    entries: list[Entry] = field(repr=False)


@dataclass(eq=False)
class _Read:
    """A prompt that was read: its tokens, its images by digest and place, and keys and values of every layer."""

    input_ids: Tensor
    images: list[tuple[bytes, int, int]]
    layers: list[tuple[Tensor, Tensor]] = field(repr=False)


class _Given(Exception):
    """The arguments of the language model are known, and the forward need not go on."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.kwargs = kwargs


class ReadOnce:
    """
    Shares readings among passes.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    shares
        Whether passes may share anything; otherwise every pass reads everything.

    Attributes
    ----------
    num_read
        Positions of the newest prompt that were read for it.
    shared
        Text and visual tokens of the newest prompt that an earlier one had read for it.
    num_encoded
        Images that went through the encoder since the engine was attached; for passes that share.
    """

    def __init__(self, runtime: Runtime, shares: bool) -> None:
        self.runtime = runtime
        self.shares = shares
        self.num_read = 0
        self.shared = (0, 0)
        self.num_encoded = 0
        self._pictures: Sequence[Picture] | None = None
        self._asks = False
        self._features: dict[bytes, _Encoded] = {}
        self._prompts: list[_Read] = []

    def attach(self, attachments: Attachments) -> None:
        """Stand in front of encoder and decoder; plain calls where nothing is shared."""
        text_model = self.runtime.family.text_model
        original = text_model.forward
        attachments.attribute(self.runtime, "prompt_hook", self._enter, "prompts of passes")
        if not self.shares:
            return
        attachments.attribute(self.runtime, "encoder_hook", self._encode, "encoder of images seen before")

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(original, args, kwargs)

        attachments.attribute(text_model, "forward", forward, "language model, beginning where prompts part")

    @contextmanager
    def showing(self, pictures: Sequence[Picture]) -> Iterator[None]:
        """A pass about these images, in order, is under way."""
        before, self._pictures = self._pictures, pictures
        try:
            yield
        finally:
            self._pictures = before

    def given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the language model would be given to read a prompt if no method acted in it; it does not run."""
        runtime, hook = self.runtime, self.runtime.encoder_hook
        if not self.shares:
            # Of whoever encodes several variants of an image.
            runtime.encoder_hook = None
        self._asks = True
        try:
            # Not through the model, whose hooks would stack branches.
            runtime.family.core(**inputs, use_cache=False)
        except _Given as known:
            return known.kwargs
        finally:
            self._asks = False
            runtime.encoder_hook = hook
        raise AssertionError("the multimodal model did not call its language model")

    def forget(self) -> None:
        """Another image, or other weights: nothing of what was read is of use any more."""
        self._features.clear()
        self._prompts.clear()

    # -- features -----------------------------------------------------------------------------------------------------

    def _encode(self, modality: str, encode: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        pictures, name = self._pictures, PIXELS["image"]
        if modality != "image" or not pictures or name not in arguments or not self._separable(len(pictures)):
            return encode(**arguments)
        encoded = [self._features.get(picture.digest) for picture in pictures]
        rows = [
            len(picture.inputs[name]) if known is None else known.num_rows
            for picture, known in zip(pictures, encoded, strict=True)
        ]
        if len(arguments[name]) != sum(rows):
            # Repeated for beams: not these images, once each.
            return encode(**arguments)
        for place, (picture, known) in enumerate(zip(pictures, encoded, strict=True)):
            if known is None:
                # It may have been the one before.
                encoded[place] = self._features.get(picture.digest) or self._encode_one(picture, encode, arguments)
        outputs = [known for known in encoded if known is not None]
        for picture, known in zip(pictures, outputs, strict=True):
            # The ones shown last come last.
            self._features.pop(picture.digest, None)
            self._features[picture.digest] = known
        for digest in list(self._features)[: -max(NUM_ENCODED, len(pictures))]:
            del self._features[digest]
        return with_entries(outputs[0].output, [entry for known in outputs for entry in known.entries])

    def _encode_one(self, picture: Picture, encode: Callable[..., Any], arguments: dict[str, Any]) -> _Encoded:
        own = {name: value for name, value in picture.inputs.items() if name in arguments}
        output = encode(**{**arguments, **own})
        entries = entries_of(output)
        self.num_encoded += 1
        # The output itself may hold the hidden states of all layers of the tower.
        kept = _Encoded(len(own[PIXELS["image"]]), with_entries(output, entries), entries)
        self._features[picture.digest] = kept
        return kept

    def _separable(self, num_pictures: int) -> bool:
        """Whether images look the same beside others."""
        return num_pictures == 1 or self.runtime.family.encodes_images_alone

    # -- the prompt ---------------------------------------------------------------------------------------------------

    def _enter(self, state: PromptState, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The prompt of a pass, before any method acts on it; see `Runtime.prompt_hook`."""
        self.num_read, self.shared = int(state.input_ids.shape[1]), (0, 0)
        offset = self._pictures[0].offset if self._pictures else None
        if offset is not None:
            embeds = kwargs["inputs_embeds"].clone()
            for span in state.layout.spans:
                # Branches may show something else in the place of the image.
                if span.modality == "image" and span.image == 0 and len(span) == len(offset):
                    embeds[span.sample, span.positions.to(embeds.device)] += offset.to(embeds)
            kwargs = {**kwargs, "inputs_embeds": embeds}
        if self._asks:
            raise _Given(kwargs)
        return kwargs

    def _forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, pictures = self.runtime.current, self._pictures
        cache: Any = kwargs.get("past_key_values")
        if state is None or not state.is_prefill or pictures is None or args or not _shareable(kwargs, cache):
            return original(*args, **kwargs)
        if any(picture.offset is not None for picture in pictures):
            return original(**kwargs)
        input_ids = state.input_ids[0].cpu()
        images = self._placed(pictures, state)
        before, shared = self._common(input_ids, images)
        if before is not None:
            visual = int(state.layout.visual[0, :shared].sum())
            self.num_read, self.shared = self.num_read - shared, (shared - visual, visual)
            for index, (keys, values) in enumerate(before.layers):
                cache.update(keys[:, :, :shared], values[:, :, :shared], index)
            kwargs = _from(shared, kwargs, state.layout.visual[0])
        output = original(**kwargs)
        if shared:
            # Whoever called looks for the last positions of a prompt that is as long as it was.
            output.last_hidden_state = torch.nn.functional.pad(output.last_hidden_state, (0, 0, shared, 0))
        # No copies: a cache that grows puts new tensors in the place of these.
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        shown = [digest for digest, *_ in images]
        others = [read for read in self._prompts if [digest for digest, *_ in read.images] != shown]
        self._prompts = [*others, _Read(input_ids, images, layers)][-NUM_KEPT:]
        return output

    def _placed(self, pictures: Sequence[Picture], state: PromptState) -> list[tuple[bytes, int, int]]:
        """What stands for images in a prompt, and where."""
        beside = b"" if self._separable(len(pictures)) else b" beside others"
        spans = state.layout.spans_of(0)
        return [(p.digest + beside, span.start, len(span)) for p, span in zip(pictures, spans, strict=True)]

    def _common(self, input_ids: Tensor, images: Sequence[tuple[bytes, int, int]]) -> tuple[_Read | None, int]:
        """The earlier prompt that begins most like this one, and how many positions they share."""
        best, most = None, 0
        for read in self._prompts:
            # The last position is read in any case: its state is what the head wants.
            limit = min(len(input_ids), len(read.input_ids)) - 1
            same = (input_ids[:limit] == read.input_ids[:limit]).long().cumprod(dim=0)
            shared = int(same.sum())
            for mine, other in zip(images, read.images, strict=False):
                if mine != other:
                    # The placeholders are the same, what stands for them is not.
                    shared = min(shared, mine[1], other[1])
                    break
            if shared > most:
                best, most = read, shared
        return best, most


def _shareable(kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether a forward reads one row without padding into an empty cache that keeps everything."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if embeds is None or len(embeds) != 1 or not isinstance(cache, Cache) or not can_share(cache):
        return False
    if any(isinstance(value, Tensor) and value.dim() for name, value in kwargs.items() if name not in _CUT):
        # Something per position that is not known here.
        return False
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))


def _from(first: int, kwargs: dict[str, Any], visual: Tensor) -> dict[str, Any]:
    """Arguments of the language model for the positions from ``first`` on."""
    out = {**kwargs, "inputs_embeds": kwargs["inputs_embeds"][:, first:]}
    for name in ("position_ids", "cache_position"):
        if kwargs.get(name) is not None:
            out[name] = kwargs[name][..., first:]
    if kwargs.get("visual_pos_masks") is not None:
        out["visual_pos_masks"] = kwargs["visual_pos_masks"][:, first:]
    if kwargs.get("deepstack_visual_embeds") is not None:
        gone = int(visual[:first].sum())
        out["deepstack_visual_embeds"] = [layer[gone:] for layer in kwargs["deepstack_visual_embeds"]]
    return out
