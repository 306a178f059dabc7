"""
Passes over the same image read it once: its features, and the keys and values of everything up to where prompts part.

A position's keys and values depend on what stands before it alone, so that a pass whose prompt begins like that of an
earlier pass takes them from there and reads the rest. Everything above the decoder (``generate``, positions, the layout
of the prompt) sees the whole prompt, and everything below sees what it would see in a prompt that continues a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.branch_vision import Entry, entries_of, with_entries
from lmmhooks.engines.prefix_sharing import can_share
from lmmhooks.vision import PIXELS

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["Picture", "ReadOnce"]

#: Prompts whose keys and values are kept: of the image in front of the model, and of what was made of it last.
NUM_KEPT = 2


@dataclass(eq=False)
class Picture:
    """
    An image of a pass.

    Attributes
    ----------
    digest
        Names its pixels.
    inputs
        What the processor makes of it alone.
    offset
        ``[n, D]`` added to its features, None for nothing; such an image shares nothing with others.
    """

    digest: bytes
    inputs: dict[str, Any]
    offset: Tensor | None = None


@dataclass(eq=False)
class _Read:
    """A prompt that was read: its tokens, its images by digest and place, and keys and values of every layer."""

    input_ids: Tensor
    images: list[tuple[bytes, int, int]]
    layers: list[tuple[Tensor, Tensor]] = field(repr=False)


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
    pictures
        Images of the pass that is under way, in order; None: nothing is shared now.
    num_read
        Positions of the newest prompt that were read for it.
    shared
        Text and visual tokens of the newest prompt that an earlier one had read for it.
    newest
        What the language model was given to read the newest prompt.
    """

    def __init__(self, runtime: Runtime, shares: bool) -> None:
        self.runtime = runtime
        self.shares = shares
        self.pictures: Sequence[Picture] | None = None
        self.num_read = 0
        self.shared = (0, 0)
        self.newest: dict[str, Any] | None = None
        self._features: dict[bytes, tuple[Any, list[Entry]]] = {}
        self._prompts: list[_Read] = []

    def attach(self, attachments: Attachments) -> None:
        """Stand in front of encoder and decoder; plain calls where nothing is shared."""
        text_model = self.runtime.family.text_model
        original = text_model.forward
        if self.shares:
            attachments.attribute(self.runtime, "encoder_hook", self._encode, "encoder of images seen before")

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(original, args, kwargs)

        attachments.attribute(text_model, "forward", forward, "language model, beginning where prompts part")

    def forget(self) -> None:
        """Another image: nothing of what was read is of use any more."""
        self._features.clear()
        self._prompts.clear()

    # -- features -----------------------------------------------------------------------------------------------------

    def _encode(self, modality: str, encode: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        pictures = self.pictures
        if modality != "image" or not pictures or not self._separable(pictures, arguments):
            return encode(**arguments)
        entries: list[Entry] = []
        for picture in pictures:
            if picture.digest not in self._features:
                given = {name: value for name, value in picture.inputs.items() if name in arguments}
                output = encode(**{**arguments, **given})
                self._features[picture.digest] = output, entries_of(output)
            like, seen = self._features[picture.digest]
            entries += seen if picture.offset is None else _shifted(seen, picture.offset)
        return with_entries(like, entries)

    def _separable(self, pictures: Sequence[Picture], arguments: dict[str, Any]) -> bool:
        """Whether the call is about these images, once each, and an image looks the same beside others."""
        if len(pictures) > 1 and not self.runtime.family.encodes_images_alone:
            return False
        name = PIXELS["image"]
        return name in arguments and len(arguments[name]) == sum(len(picture.inputs[name]) for picture in pictures)

    # -- the prompt ---------------------------------------------------------------------------------------------------

    def _forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, cache = self.runtime.current, kwargs.get("past_key_values")
        if state is None or not state.is_prefill:
            return original(*args, **kwargs)
        input_ids = state.input_ids[0].cpu()
        self.num_read, self.shared, self.newest = len(input_ids), (0, 0), kwargs
        if not self.shares or self.pictures is None or args or not _shareable(kwargs, cache):
            return original(*args, **kwargs)
        spans = state.layout.spans_of(0)
        images = [(picture.digest, span.start, len(span)) for picture, span in zip(self.pictures, spans, strict=True)]
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
        if all(picture.offset is None for picture in self.pictures):
            # No copies: a cache that grows puts new tensors in the place of these.
            layers = [(layer.keys, layer.values) for layer in cache.layers]
            shown = [digest for digest, *_ in images]
            others = [read for read in self._prompts if [digest for digest, *_ in read.images] != shown]
            self._prompts = [*others, _Read(input_ids, images, layers)][-NUM_KEPT:]
        return output

    def _common(self, input_ids: Tensor, images: Sequence[tuple[bytes, int, int]]) -> tuple[_Read | None, int]:
        """The earlier prompt that begins most like this one, and how many positions they share."""
        best, most = None, 0
        if any(picture.offset is not None for picture in self.pictures or ()):
            return best, most
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
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))
    return embeds is not None and len(embeds) == 1 and plain and isinstance(cache, Cache) and can_share(cache)


def _shifted(entries: Sequence[Entry], offset: Tensor) -> list[Entry]:
    """Features of one image, entry after entry, with an offset on what the decoder takes as embeddings."""
    parts = offset.split([len(entry[0]) for entry in entries])
    return [(entry[0] + part.to(entry[0]), *entry[1:]) for entry, part in zip(entries, parts, strict=True)]


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
