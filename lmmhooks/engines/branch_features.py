"""What branches show in place of an image, and what the main branch attended to when that depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.engines.branch_rows import spans_in_order
from lmmhooks.engines.branch_vision import EncodedImages, Entry, image_generator
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.engines.probing import Readings
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.layout import Layout, VisualSpan
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import ImageView
from lmmhooks.vision import VisionInputs

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit
    from lmmhooks.engines.runtime import Runtime

__all__ = ["ImageStage", "PromptAttention", "PromptReader", "ShownImages", "image_pixels"]

#: What stands in an image's place: visual tokens, or ids of text.
Shown = tuple[Tensor, ...] | Tensor


def _place_of(span: VisualSpan) -> tuple[str, int, int]:
    return span.modality, span.sample, span.source


@dataclass(eq=False)
class PromptAttention:
    """What the last prompt token of every main row paid to its images: ``[layers, n]`` by modality, row and image."""

    of_image: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)


class PromptReader:
    """
    Reads what the last prompt token attends to in the main rows, for branches that read after them.

    Attributes
    ----------
    probes
        For the attention engine.
    """

    def __init__(self, runtime: Runtime, method: DecodingMethod) -> None:
        self.layers = list(method.reads_prompt(runtime.family))
        self.probes = [DecoderProbe(layer, "last", hears=partial(self._hear, layer)) for layer in self.layers]
        self.listening = False
        self._rows: dict[int, Tensor] = {}

    def begin(self) -> None:
        """A forward of main rows alone begins."""
        self.listening = True
        self._rows = {}

    def end(self, layout: Layout) -> dict[tuple[str, int, int], Tensor]:
        """That forward is over; what it paid to the images of ``layout``, the prompt as given."""
        self.listening = False
        read, self._rows = self._rows, {}
        if not read:
            return {}
        # Layers may lie on several devices.
        rows = torch.stack([read[layer].to(read[self.layers[0]].device) for layer in self.layers])
        return {_place_of(span): rows[:, span.sample, span.positions.to(rows.device)] for span in layout.spans}

    def _hear(self, layer: int, weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
        if not self.listening:
            return
        # One row per sample; where rows come in blocks, the others add nothing.
        own = (members.to(weights.dtype)[:, None, None, :] @ weights)[:, :, 0].mean(dim=1)
        if (index := edit.stage.index) is not None:
            # Some tokens left before this layer: attention in the coordinates of the prompt as given.
            full = own.new_zeros(own.shape[0], edit.state.layout.length + 1)
            own = full.scatter(1, index.to(own.device) % full.shape[1], own)[:, :-1]
        self._rows[layer] = self._rows.get(layer, 0) + own


@dataclass(eq=False)
class ImageStage:
    """
    A prompt as its images stand in it.

    Attributes
    ----------
    input_ids, mask, layout
        ``[B, N]`` and what they show.
    entries
        Features in row order, by modality, beam copies included.
    visions, records
        The encoder calls, and what was noted of them.
    attention
        Of the main rows, if they were read before.
    replies
        What the model said to `DecodingMethod.asks_first`, by row.
    """

    input_ids: Tensor
    mask: Tensor
    layout: Layout
    entries: Mapping[str, list[Entry]]
    visions: Mapping[str, VisionInputs]
    records: Mapping[str, EncodedImages | None]
    attention: PromptAttention | None = None
    replies: Sequence[Tensor] | None = None

    def images(self) -> Iterator[tuple[VisualSpan, list[Entry]]]:
        """Every image of every row with its entries, in row order within a modality."""
        for modality, entries in self.entries.items():
            sizes = self.visions[modality].entries_per_image or ()
            start = 0
            for span in spans_in_order(self.layout, modality):
                yield span, entries[start : start + sizes[span.source]]
                start += sizes[span.source]


class ShownImages:
    """
    Asks a method what its branches show.

    Attributes
    ----------
    readings
        Probes of the vision tower; its hooks are attached by whoever attaches the engine.
    """

    def __init__(self, runtime: Runtime, method: DecodingMethod) -> None:
        self.runtime = runtime
        self.family = runtime.family
        self.method = method
        self.probes = list(method.probes(runtime.family))
        self.readings = Readings(runtime, self.probes)

    def transformed(self, branch: Branch, stage: ImageStage) -> dict[str, list[Entry]]:
        """Entries of a branch with ``image="features"``, in row order by modality."""
        out: dict[str, list[Entry]] = {modality: [] for modality in stage.entries}
        view = self._viewer(branch, stage)
        for span, entries in stage.images():
            if not len(span):  # masked away: nobody sees it
                out[span.modality] += entries
                continue
            whole = _whole(span, entries)
            changed = self.method.transform_features(whole, branch, view(span))
            self._check(branch, whole, changed, len(whole[0]))
            sizes = [len(entry[0]) for entry in entries]
            parts = [tensor.to(old).split(sizes) for tensor, old in zip(changed, whole, strict=True)]
            out[span.modality] += list(zip(*parts, strict=True))
        return out

    def replaced(self, branch: Branch, stage: ImageStage) -> dict[tuple[str, int, int], Shown]:
        """What stands for every image in a branch with ``image="replaced"``, by modality, row and image."""
        out: dict[tuple[str, int, int], Shown] = {}
        view = self._viewer(branch, stage)
        for span, entries in stage.images():
            if not len(span):
                continue
            whole = _whole(span, entries)
            shown = self.method.replace_image(whole, branch, view(span))
            if isinstance(shown, Tensor):
                self._check_ids(branch, shown)
            else:
                self._check(branch, whole, shown, None)
                shown = tuple(tensor.to(old) for tensor, old in zip(shown, whole, strict=True))
            out[_place_of(span)] = shown
        return out

    def known(self, modality: str, stage: ImageStage, branch: Branch) -> list[ImageView]:
        """What is known of every image of an encoder call; rows that repeat a prompt say the same of it."""
        view = self._viewer(branch, stage)
        first = {span.source: span for span in reversed(spans_in_order(stage.layout, modality))}
        return [view(first[source]) for source in sorted(first)]

    # -- what a method sees of an image --------------------------------------------------------------------------------

    def _viewer(self, branch: Branch, stage: ImageStage) -> Callable[[VisualSpan], ImageView]:
        read: dict[tuple[str, str], list[Tensor]] = {}
        rows: dict[int, Tensor] = {}

        def view(span: VisualSpan) -> ImageView:
            values = {}
            for probe in self.probes:
                key = span.modality, probe.name
                if key not in read:
                    read[key] = self._per_image(probe.name, stage, span.modality)
                value = read[key][span.source].float()
                values[probe.name] = value[..., 0] if probe.is_scalar else value
            if span.sample not in rows:
                rows[span.sample] = stage.input_ids[span.sample][stage.mask[span.sample]]
            return ImageView(
                family=self.family,
                modality=span.modality,
                tokens=span.tokens,
                readings=values,
                attention=None if stage.attention is None else stage.attention.of_image.get(_place_of(span)),
                prompt=rows[span.sample],
                ordinal=span.image,
                processor=self.runtime.processor,
                reply=None if stage.replies is None else stage.replies[span.sample],
                generator=partial(self._generator, branch, stage, span),
            )

        return view

    def _per_image(self, name: str, stage: ImageStage, modality: str) -> list[Tensor]:
        """What a probe read, per image as given; variants of branches may have gone through the tower beside them."""
        vision, record = stage.visions[modality], stage.records[modality]
        if record is None or name not in vision.probes:
            raise PromptError(
                f"{modality} features were encoded before {self.method.id} was attached, so the vision tower was not "
                "read; pass pixel_values instead of mm_encoder_outputs"
            )
        joint = record.joint
        if joint is None or joint.probes is not vision.probes:
            return self.family.tower_to_tokens(vision.probes[name], vision)
        images = vision.entries_per_image or ()
        joint.entries_per_image = images * len(record.blocks)
        first = record.blocks[""] * len(images)
        return self.family.tower_to_tokens(joint.probes[name], joint)[first : first + len(images)]

    def _generator(self, branch: Branch, stage: ImageStage, span: VisualSpan) -> torch.Generator:
        record = stage.records[span.modality]
        if record is None:
            raise PromptError(
                f"{span.modality} features were encoded before {self.method.id} was attached, so its random numbers "
                "cannot be tied to the pixels; pass pixel_values instead of mm_encoder_outputs"
            )
        pixels = image_pixels(self.family, stage.visions[span.modality], span.source)
        return image_generator(pixels.float(), branch, getattr(self.method, "seed", 0))

    # -- what a method may answer --------------------------------------------------------------------------------------

    def _check(self, branch: Branch, before: Sequence[Tensor], after: Sequence[Tensor], length: int | None) -> None:
        asked, given = [tuple(old.shape) for old in before], [tuple(new.shape) for new in after]
        num = given[0][0] if given and length is None else length
        if given != [(num, *shape[1:]) for shape in asked] or not num:
            raise MethodError(
                f"{self.method.id}: branch {branch.name!r} shows tensors of shape {given} for an image of {asked}; "
                "every tensor must come back with its width"
                + (" and its number of tokens" if length else ", all with equally many tokens, at least one")
            )

    def _check_ids(self, branch: Branch, ids: Tensor) -> None:
        placeholders = torch.tensor(self.family.visual_ids, device=ids.device)
        if ids.ndim != 1 or ids.is_floating_point() or bool(torch.isin(ids, placeholders).any()):
            raise MethodError(
                f"{self.method.id}: branch {branch.name!r} puts {ids.dtype} {list(ids.shape)} in the place of an "
                "image; give token ids, [k] long, none of which stands for an image"
            )


def image_pixels(family: Any, vision: VisionInputs, source: int) -> Tensor:
    """Pixels ``[crops or frames, C, H, W]`` of one image of an encoder call, placed in a prompt before."""
    pieces = family.unpack_pixels(vision)
    sizes = vision.entries_per_image or ()
    if len(pieces) == len(sizes):
        return pieces[source]
    # Tiles, several of which make up an image.
    start = sum(sizes[:source])
    return torch.cat(pieces[start : start + sizes[source]])


def _whole(span: VisualSpan, entries: Sequence[Entry]) -> tuple[Tensor, ...]:
    """Features of one image, tile after tile."""
    whole = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*entries, strict=True))
    if len(whole[0]) != len(span):
        raise PromptError(
            f"{span.modality} {span.image} of row {span.sample} has {len(whole[0])} tokens, of which the attention "
            f"mask hides {len(whole[0]) - len(span)}; mask whole images or none of their tokens"
        )
    return whole
