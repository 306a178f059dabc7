"""
Images of decoding branches: all variants of an image go through the vision tower as one batch.

``generate`` encodes images before its loop and drops the pixels, so variants are made at that moment. What is handed
back to ``generate`` are the features of the images as given; those of the variants travel with them, as an attribute of
the very object, until the prompt is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.vision import VisionInputs

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.methods.decoding.view import ImageView

__all__ = ["BranchEncoder", "EncodedImages", "Entry", "entries_of", "image_generator", "with_entries"]

#: Features of one image or tile: ``pooler_output`` first, then one tensor per deepstack layer.
Entry = tuple[Tensor, ...]

#: What is known of the images of an encoder call in a branch.
Views = Callable[[Branch], "list[ImageView]"]

_RECORD = "_lmmhooks_branches"
#: Arguments that may be lists and still run along the images.
_PER_IMAGE = ("image_sizes", "image_sizes_videos", "batch_num_images")


def entries_of(output: Any) -> list[Entry]:
    """Features of an encoder output, entry by entry."""
    pooled = output.pooler_output
    if isinstance(pooled, Tensor) and pooled.ndim == 2:
        pooled = [pooled]
    layers = list(getattr(output, "deepstack_features", None) or [])
    if layers and isinstance(layers[0], Tensor):
        # Before 5.20 a layer's features came in one piece.
        layers = [layer.split([len(entry) for entry in pooled]) for layer in layers]
    return list(zip(pooled, *layers, strict=True))


def with_entries(like: Any, entries: Sequence[Entry]) -> Any:
    """An encoder output of the same type as ``like`` that holds these entries, and nothing else."""
    features = [entry[0] for entry in entries]
    pooled = like.pooler_output
    fields: dict[str, Any] = {"pooler_output": features}
    if isinstance(pooled, Tensor):
        # Decoders that take a tensor take its rows in order, so that entries of different lengths can be one.
        even = pooled.ndim > 2 and len({len(entry) for entry in features}) == 1
        fields["pooler_output"] = torch.stack(features) if even else torch.cat(features)
    if deepstack := getattr(like, "deepstack_features", None):
        layers = [list(layer) for layer in zip(*(entry[1:] for entry in entries), strict=True)]
        fields["deepstack_features"] = (
            [torch.cat(layer) for layer in layers] if isinstance(deepstack[0], Tensor) else layers
        )
    return type(like)(**fields)


def image_generator(pixels: Tensor, branch: Branch, seed: int) -> torch.Generator:
    """
    Random numbers for one image of one branch, the same wherever and beside whatever the image is encoded.

    Parameters
    ----------
    pixels
        float32 pixels of the image, without padding.
    branch
        Two branches of a method draw different numbers.
    seed
        The method's.
    """
    digest = hashlib.blake2b(pixels.contiguous().cpu().numpy().tobytes(), digest_size=8)
    digest.update(f"{branch.name}/{seed}".encode())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))


@dataclass(eq=False)
class EncodedImages:
    """
    One encoder call of a prompt, and the same call for the pixel variants of the branches.

    Attributes
    ----------
    modality, encode, arguments
        The call.
    num_entries
        Entries of the images as given.
    probes
        What vision probes read, variants included when they were encoded along.
    joint
        The call that encoded the variants; None while that is put off.
    blocks
        Per branch name, which block of entries of ``joint`` is the branch's; ``""`` for the images as given.
    notes
        What the method noted of the variants.
    """

    modality: str
    encode: Callable[..., Any]
    arguments: dict[str, Any]
    num_entries: int = 0
    probes: dict[str, list[Tensor]] = field(default_factory=dict)
    joint: VisionInputs | None = None
    blocks: dict[str, int] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def as_given(self, output: Any) -> VisionInputs:
        """The call for the images as given, ``output`` being what it returned, beams expanded or not."""
        vision = VisionInputs(self.modality, self.arguments, output, probes=self.probes)
        vision.num_entries = self.num_entries
        return vision

    def block(self, branch: str) -> list[Entry]:
        """Features of the images in a branch, before any beam expansion."""
        assert self.joint is not None
        start = self.blocks[branch] * self.num_entries
        return entries_of(self.joint.output)[start : start + self.num_entries]


class BranchEncoder:
    """
    Encodes images together with their variants.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    method
        Makes the pixels of the variants.
    branches
        Beside the main one.
    put_off
        Encode variants only when `ensure_variants` asks for them.
    """

    def __init__(self, runtime: Runtime, method: DecodingMethod, branches: Sequence[Branch], put_off: bool) -> None:
        self.runtime = runtime
        self.method = method
        self.variants = [branch for branch in branches if branch.image == "pixels"]
        self.put_off = put_off
        # Branches that show the images as given take part in a put-off call as well, so that one call has them all.
        self.shows_given = not put_off or any(branch.image == "same" for branch in branches)
        self.ready: dict[str, Any] = {}
        """What the next encoder calls are to return: how stacked features enter models that encode in their forward."""

    def __call__(self, modality: str, encode: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Stands in for the encoder; see `Runtime.encoder_hook`."""
        if modality in self.ready:
            output = self.ready.pop(modality)
            if (record := getattr(output, _RECORD, None)) is not None:
                self.runtime.readings = record.probes
            return output
        # Probes fill the dictionary while the call runs; the record must know them however late it is asked.
        record = EncodedImages(modality, encode, {**arguments, "return_dict": True}, probes=self.runtime.readings)
        if self.variants and not self.put_off:
            joint = self._encode_variants(record)
            joint.probes = record.probes
            output = with_entries(joint.output, record.block(""))
        else:
            output = encode(**record.arguments)
            record.num_entries = len(entries_of(output))
        setattr(output, _RECORD, record)
        return output

    def record_of(self, output: Any) -> EncodedImages | None:
        """What was noted when ``output`` was encoded; None if that did not happen under this patch."""
        record: EncodedImages | None = getattr(output, _RECORD, None)
        return record

    def ensure_variants(self, record: EncodedImages, views: Views | None = None) -> None:
        """
        Encode the variants if that was put off.

        Parameters
        ----------
        record
            Of the encoder call.
        views
            For branches that read after the main rows: what is known of the images of the call, by branch.
        """
        if self.variants and record.joint is None:
            self.runtime.readings = {}
            self._encode_variants(record, views).probes = self.runtime.readings

    def _encode_variants(self, record: EncodedImages, views: Views | None = None) -> VisionInputs:
        names = [""] if self.shows_given else []
        calls = [record.arguments] if self.shows_given else []
        for branch in self.variants:
            names.append(branch.name)
            calls.append(self._transformed(record, branch, views(branch) if views and branch.after_main else []))
        merged = _merge(calls)
        output = record.encode(**merged)
        record.joint = joint = VisionInputs(record.modality, merged, output)
        record.blocks = {name: block for block, name in enumerate(names)}
        record.num_entries = joint.num_entries // len(calls)
        return joint

    def _transformed(self, record: EncodedImages, branch: Branch, views: Sequence[ImageView]) -> dict[str, Any]:
        """Arguments of the call with the pixels of a branch."""
        family, method = self.runtime.family, self.method
        vision = VisionInputs(record.modality, record.arguments, BaseModelOutputWithPooling(pooler_output=[]))
        changed = []
        images = family.unpack_pixels(vision)
        # Some encoders take tiles, several of which make up an image.
        tiles = [(view, tile) for view in views for tile in range(len(view.tokens.grids))]
        known = [(view, 0) for view in views] if len(views) == len(images) else tiles
        for index, image in enumerate(images):
            pixels = image.float()
            generator = image_generator(pixels, branch, getattr(method, "seed", 0))
            view, crop = known[index] if views else (None, 0)
            processor = self.runtime.processor
            context = BranchContext(family, processor, index, notes=record.notes, image=view, crop=crop)
            out = method.transform_pixels(pixels, branch, generator, context)
            if out.shape != pixels.shape:
                raise MethodError(
                    f"{method.id}: branch {branch.name!r} turned pixels of shape {list(pixels.shape)} into "
                    f"{list(out.shape)}; transform_pixels must keep the shape"
                )
            changed.append(out.to(image))
        return {**record.arguments, vision.pixels_name: family.pack_pixels(changed, vision)}


def _merge(calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One call with the images of all calls, in order."""
    merged = dict(calls[0])
    for name, value in merged.items():
        if isinstance(value, Tensor):
            merged[name] = torch.cat([call[name] for call in calls])
        elif name in _PER_IMAGE and value is not None:
            merged[name] = [item for call in calls for item in call[name]]
    return merged
