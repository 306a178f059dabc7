"""Prompts of decoding branches: every branch's tokens, positions and features, stacked as rows of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.engines.branch_features import ImageStage, PromptAttention, Shown, ShownImages
from lmmhooks.engines.branch_inputs import PromptInputs
from lmmhooks.engines.branch_rows import (
    entry_order,
    grids_of,
    left_pad,
    position_after,
    replace_images,
    shift_sources,
    tokens_of,
)
from lmmhooks.engines.branch_vision import BranchEncoder, EncodedImages, Entry, entries_of, with_entries
from lmmhooks.engines.stacked_prompt import StackedPrompt
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.layout import Layout, build_layout
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.vision import VisionInputs

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["PromptStacker"]

#: Arguments of a forward that run along the tokens of the prompt and are built anew here.
_REBUILT = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "mm_token_type_ids",
    "second_per_grid_ts",
    "mm_encoder_outputs",
)


@dataclass(eq=False)
class _Reading:
    """One branch: ``[B, L]`` tokens and mask, ``[..., B, L]`` positions, layout, features in row order by modality."""

    input_ids: Tensor
    mask: Tensor
    positions: Tensor
    layout: Layout
    entries: dict[str, list[Entry]]


class PromptStacker(PromptInputs):
    """Builds the rows of all branches of a prompt from the arguments of one forward."""

    def __init__(
        self, runtime: Runtime, method: DecodingMethod, branches: Sequence[Branch], encoder: BranchEncoder
    ) -> None:
        super().__init__(runtime, method, branches, encoder)
        self.shown = ShownImages(runtime, method)
        self.main = method.main_branch(runtime.family)
        self.same_tokens = all(branch.same_tokens for branch in (self.main, *branches))
        self.memory: dict[Any, Any] = {}
        """What the method remembered while the newest prompt was stacked: that prompt's memory begins with it."""
        self.notes: list[dict[str, Any]] = []

    # -- rows ----------------------------------------------------------------------------------------------------------

    def stack(
        self,
        kwargs: dict[str, Any],
        with_main: bool,
        attention: PromptAttention | None = None,
        replies: Sequence[Tensor] | None = None,
    ) -> StackedPrompt:
        """
        Read the arguments of a forward in every branch.

        Parameters
        ----------
        kwargs
            From `encode`.
        with_main
            Whether the main branch is among the rows, as the first block.
        attention
            What the main rows attended to, if they were read before.
        replies
            What the model said to `DecodingMethod.asks_first`, by row.

        Raises
        ------
        PromptError
            Inputs that some branch cannot be made from.
        """
        input_ids, mask = tokens_of(kwargs)
        outputs: dict[str, Any] = kwargs["mm_encoder_outputs"]
        records = self._records(input_ids, mask, outputs, attention)
        self.memory, self.notes = {}, [note for record in records.values() if record for note in record.notes]
        visions = {
            modality: record.as_given(outputs[modality]) if record else VisionInputs(modality, {}, outputs[modality])
            for modality, record in records.items()
        }
        entries = {modality: entries_of(output) for modality, output in outputs.items()}
        replaced: dict[str, dict[tuple[str, int, int], Shown]] = {}
        given: Layout | None = None
        if any(branch.image == "replaced" for branch in self.branches):
            given = build_layout(input_ids, mask, self.family, list(visions.values()))
            images = ImageStage(input_ids, mask, given, entries, visions, records, attention, replies)
            for branch in self.branches:
                if branch.image == "replaced":
                    replaced[branch.name] = self.shown.replaced(branch, images)
        texts = self._texts(input_ids, mask, given, replaced)
        layout = build_layout(*texts[0], self.family, list(visions.values()))
        main = _Reading(
            *texts[0],
            self._main_positions(kwargs, mask, texts[0], layout, visions),
            layout,
            entries,
        )
        images = ImageStage(main.input_ids, main.mask, layout, entries, visions, records, attention, replies)
        readings = [self._read_main(main, texts[-1], kwargs, images)] if with_main else []
        for branch, text in zip(self.branches, texts[1:-1], strict=True):
            if branch.image == "replaced":
                readings.append(self._read_replaced(text, images, replaced[branch.name]))
            else:
                readings.append(self._read(branch, main, text, kwargs, images))
        return self._join(kwargs, readings, outputs, records, visions)

    def _records(
        self, input_ids: Tensor, mask: Tensor, outputs: Mapping[str, Any], attention: PromptAttention | None
    ) -> dict[str, EncodedImages | None]:
        """What was noted of the encoder calls, variants of branches encoded by now."""
        records = {modality: self.encoder.record_of(output) for modality, output in outputs.items()}
        images: ImageStage | None = None
        if any(branch.after_main for branch in self.encoder.variants):
            visions = {m: record.as_given(outputs[m]) for m, record in records.items() if record is not None}
            given = build_layout(input_ids, mask, self.family, list(visions.values()))
            images = ImageStage(input_ids, mask, given, {}, visions, records, attention)
        for modality, record in records.items():
            if record is not None:
                views = None if images is None else partial(self.shown.known, modality, images)
                self.encoder.ensure_variants(record, views)
        return records

    def _texts(
        self,
        input_ids: Tensor,
        mask: Tensor,
        given: Layout | None,
        replaced: Mapping[str, Mapping[tuple[str, int, int], Shown]],
    ) -> list[tuple[Tensor, Tensor]]:
        """
        Tokens and mask as given, of every branch, and of the main one as it reads them.

        All of one length, padded on the left if they differ.
        """
        if self.same_tokens:
            # As given, so that the columns of the caller stay what they are, padding on the right included.
            return [(input_ids, mask)] * (2 + len(self.branches))
        rows = [ids[valid] for ids, valid in zip(input_ids, mask, strict=True)]
        edited = [rows]
        for branch in (*self.branches, self.main):
            if branch.image == "replaced":
                assert given is not None
                edited.append(self._replace(input_ids, mask, given, replaced[branch.name]))
            else:
                edited.append([self._edit(row, branch, index) for index, row in enumerate(rows)])
        length = max(len(row) for block in edited for row in block)
        return [
            (left_pad(block, length), left_pad([torch.ones_like(r) for r in block], length).bool()) for block in edited
        ]

    def _edit(self, row: Tensor, branch: Branch, index: int) -> Tensor:
        if branch.same_tokens:
            return row
        visual = torch.tensor(self.family.visual_ids, device=row.device)
        out = row[~torch.isin(row, visual)] if branch.image == "none" else row
        if branch.text == "edited":
            context = BranchContext(self.family, self.runtime.processor, index, self.memory, self.notes)
            out = self.method.edit_tokens(out, branch, context)
        if not len(out):
            raise PromptError(
                f"{self.method.id}: nothing is left of a prompt of {len(row)} tokens in branch {branch.name!r}; "
                "the prompt needs text beside its images"
            )
        return out

    def _replace(
        self, input_ids: Tensor, mask: Tensor, given: Layout, shown: Mapping[tuple[str, int, int], Shown]
    ) -> list[Tensor]:
        """Rows with placeholders for the visual tokens, or the text, that stand in the place of images."""
        ids = {"image": self.family.image_token_id, "video": self.family.video_token_id}
        runs = {}
        for place, what in shown.items():
            if isinstance(what, Tensor):
                runs[place] = what.to(input_ids), True
            else:
                token = ids[place[0]]
                assert token is not None, "a modality that was encoded has a placeholder"
                runs[place] = torch.full_like(input_ids[0, :1], token).expand(len(what[0])), False
        placeholders = [i for i in ids.values() if i is not None]
        marks = [i for i in self.family.visual_ids if i not in placeholders]
        return replace_images(
            input_ids,
            mask,
            given,
            runs,
            torch.tensor(placeholders, device=input_ids.device),
            torch.tensor(marks, dtype=torch.long, device=input_ids.device),
        )

    def _read_replaced(
        self, text: tuple[Tensor, Tensor], images: ImageStage, shown: Mapping[tuple[str, int, int], Shown]
    ) -> _Reading:
        """
        Rows whose images are something else: text as far as positions and whatever acts below are concerned.

        What stands there has no place in an image any more, so there is nothing a reducer could keep of it or an
        attention method could look for.
        """
        entries: dict[str, list[Entry]] = {}
        for span, _ in images.images():
            what = shown.get((span.modality, span.sample, span.source))
            if isinstance(what, tuple):
                entries.setdefault(span.modality, []).append(what)
        marks = [i for i in (self.family.image_token_id, self.family.video_token_id) if i is not None]
        words = text[0].masked_fill(torch.isin(text[0], torch.tensor(marks, device=text[0].device)), 0)
        layout = build_layout(words, text[1], self.family, [])
        return _Reading(*text, self.family.position_ids(words, text[1]), layout, entries)

    def _read_main(
        self, main: _Reading, text: tuple[Tensor, Tensor], kwargs: Mapping[str, Any], images: ImageStage
    ) -> _Reading:
        return main if self.main.same_tokens else self._read(self.main, main, text, kwargs, images)

    def _main_positions(
        self,
        kwargs: dict[str, Any],
        mask: Tensor,
        text: tuple[Tensor, Tensor],
        layout: Layout,
        visions: Mapping[str, VisionInputs],
    ) -> Tensor:
        given = kwargs.get("position_ids")
        if given is None:
            return self.family.position_ids(*text, **grids_of(kwargs, layout, visions))
        given = self._expanded(given, mask)
        if self.same_tokens:
            return given
        rows = [given[..., row, :][..., valid] for row, valid in enumerate(mask)]
        length = text[0].shape[1]
        padded = [torch.nn.functional.pad(row, (length - row.shape[-1], 0)) for row in rows]
        return torch.stack(padded, dim=-2)

    def _read(
        self,
        branch: Branch,
        main: _Reading,
        text: tuple[Tensor, Tensor],
        kwargs: Mapping[str, Any],
        images: ImageStage,
    ) -> _Reading:
        visions = images.visions
        if branch.image == "none":
            layout = build_layout(*text, self.family, [])
            return _Reading(*text, self.family.position_ids(*text), layout, {})
        layout, positions = main.layout, main.positions
        if not branch.same_tokens:
            if int((text[0][text[1]] == self.family.image_token_id).sum()) != int(
                (main.input_ids[main.mask] == self.family.image_token_id).sum()
            ):
                raise MethodError(
                    f"{self.method.id}: edit_tokens changed the number of visual tokens in branch {branch.name!r}; "
                    "only text may be edited in a branch with an image"
                )
            layout = build_layout(*text, self.family, list(visions.values()))
            positions = self.family.position_ids(*text, **grids_of(kwargs, layout, visions))
        entries = dict(main.entries)
        if branch.image == "pixels":
            for modality, record in images.records.items():
                assert record is not None
                block = record.block(branch.name)
                entries[modality] = [block[i] for i in entry_order(main.layout, modality, visions[modality])]
        elif branch.image == "features":
            entries = self.shown.transformed(branch, images)
        return _Reading(*text, positions, layout, entries)

    def _join(
        self,
        kwargs: dict[str, Any],
        readings: Sequence[_Reading],
        outputs: Mapping[str, Any],
        records: Mapping[str, EncodedImages | None],
        visions: Mapping[str, VisionInputs],
    ) -> StackedPrompt:
        mask = torch.cat([reading.mask for reading in readings])
        padded = None if bool(mask.all()) else mask
        positions = torch.cat([reading.positions for reading in readings], dim=-2)
        first, others = (
            {modality: [e for reading in part for e in reading.entries.get(modality, [])] for modality in outputs}
            for part in (readings[:1], readings[1:])
        )
        stacked = {
            modality: with_entries(output, entries)
            for modality, output in outputs.items()
            if (entries := [*first[modality], *others[modality]])
        }
        joined = {
            "input_ids": torch.cat([reading.input_ids for reading in readings]),
            "attention_mask": None if padded is None else padded.long(),
            "position_ids": positions,
            "mm_encoder_outputs": stacked,
        }
        rest = {key: value for key, value in kwargs.items() if key not in _REBUILT}
        if rest.get("token_type_ids") is not None:
            rest["token_type_ids"] = self._repeat_types(rest["token_type_ids"], len(readings))
        layouts, joint = self._place(readings, records, visions)
        following, layout = position_after(positions, mask), Layout.stack(layouts)
        return StackedPrompt({**rest, **joined}, padded, following, layout, joint, (first, others), outputs)

    def _repeat_types(self, types: Tensor, times: int) -> Tensor:
        if not self.same_tokens:
            raise PromptError(
                f"{self.method.id} changes the tokens of a prompt, but the model wants token_type_ids, which cannot be "
                "changed with them; use a method whose branches read the same tokens"
            )
        return types.repeat(times, 1)

    def _place(
        self,
        readings: Sequence[_Reading],
        records: Mapping[str, EncodedImages | None],
        visions: Mapping[str, VisionInputs],
    ) -> tuple[list[Layout], list[VisionInputs]]:
        """Layouts whose sources count the images of one encoder call for all branches, and those calls."""
        layouts = [reading.layout for reading in readings]
        if not self.encoder.variants:
            return layouts, list(visions.values())
        joint = []
        names = [branch.name if branch.image == "pixels" else "" for branch in self.branches]
        names = ["", *names] if len(readings) > len(names) else names
        for modality, record in records.items():
            assert record is not None
            assert record.joint is not None
            images = visions[modality].entries_per_image or ()
            record.joint.entries_per_image = images * len(record.blocks)
            joint.append(record.joint)
            for row, name in enumerate(names):
                shift = record.blocks.get(name, 0) * len(images)
                layouts[row] = shift_sources(layouts[row], modality, shift)
        return layouts, joint
