"""What is known about one prompt while the model reads and continues it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lmmhooks.engines.rows import RowPlan, all_rows, plan_rows
from lmmhooks.errors import PromptError
from lmmhooks.layout import Layout

__all__ = ["Pressed", "PromptState", "RowKeeper", "Stage"]


@dataclass(frozen=True, eq=False)
class Pressed:
    """
    What the cache of one decoder layer holds of a prompt whose keys and values were compressed after it was read.

    Entries differ from head to head, so that there is no layout of them.

    Attributes
    ----------
    length
        Entries per row and head, fillers included.
    mask
        ``[B, length]`` bool, False for fillers; None when there are none.
    """

    length: int
    mask: Tensor | None


@dataclass
class Stage:
    """
    The sequence as decoder layers see it from one layer on; a new stage begins at every reduction.

    Attributes
    ----------
    layer
        First decoder layer that sees this sequence.
    layout
        Its layout, covering cached and generated positions.
    index
        ``[B, N]`` position of every entry in the prompt as given, -1 for padding; None when nothing was removed.
    mask
        ``[B, N]`` bool padding mask; None when nothing is padded.
    removed
        ``[B]`` number of prompt tokens of each sample that this stage no longer holds; None when nothing was removed.
    shift
        ``[B]`` how many positions earlier than in the unpatched model later tokens sit, because survivors were
        renumbered; None when they were not.
    """

    layer: int
    layout: Layout
    index: Tensor | None = None
    mask: Tensor | None = None
    removed: Tensor | None = None
    shift: Tensor | None = None
    plans: dict[Any, RowPlan | None] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)
    """Tensors shared by the layers of this stage within one forward; emptied when the next one begins."""

    def grow(self, num_new: int, valid: Tensor | None = None) -> None:
        """Append generated (or continued) tokens; ``valid [B, num_new]`` is False where a row has fewer."""
        if self.mask is None and valid is not None:
            self.mask = torch.ones_like(self.layout.segment, dtype=torch.bool)
        self.layout = self.layout.extend(num_new, valid)
        if self.mask is not None:
            new = self.mask.new_ones(self.mask.shape[0], num_new) if valid is None else valid.to(self.mask.device)
            self.mask = torch.cat([self.mask, new], dim=1)
        self.plans.clear()

    def shrink(self, num_gone: int) -> None:
        """Forget the last entries: the caller cropped its cache (assisted decoding)."""
        self.layout = self.layout.crop(num_gone)
        if self.mask is not None:
            self.mask = self.mask[:, :-num_gone]
        self.plans.clear()

    def rows(self, names: Iterable[str], num_queries: int, *, is_prefill: bool = False) -> RowPlan | None:
        """
        Plan for the named row selections of the current call, kept until the sequence grows.

        ``is_prefill``: queries that are fewer than the sequence are its end, of which a selection names some; otherwise
        they are new tokens, which belong to every selection.
        """
        wanted = tuple(sorted(set(names)))
        key = (wanted, num_queries)
        if key not in self.plans:
            if is_prefill:
                own = {name: select_rows(self.layout, name)[:, -num_queries:] for name in wanted}
                self.plans[key] = plan_rows(own)
            elif num_queries < self.layout.length:
                batch = self.layout.batch
                self.plans[key] = all_rows(list(wanted), batch, num_queries, self.layout.segment.device)
            else:
                self.plans[key] = plan_rows({name: select_rows(self.layout, name) for name in wanted})
        return self.plans[key]


def select_rows(layout: Layout, name: str) -> Tensor:
    """
    ``[B, N]`` bool of a named row selection of a prompt.

    ``"instruction:32"``: the last 32 rows of one; ``"after_last_image+8"``: one, and the last 8 rows in any case.
    """
    if "+" in name:
        name, _, least = name.partition("+")
        return select_rows(layout, name) | _last_rows(layout.valid, int(least))
    name, _, most = name.partition(":")
    if most:
        return _last_rows(select_rows(layout, name), int(most))
    if name == "after_image":
        return layout.after_image
    if name == "after_last_image":
        return layout.after_last_image
    if name == "last":
        return layout.last
    if name == "instruction":
        return layout.instruction
    if name == "text":
        return layout.valid & ~layout.visual
    if name == "all":
        return layout.valid
    names = "after_image, after_last_image, instruction, last, text, all"
    raise PromptError(f"no row selection is called {name!r}; there are: {names}")


def _last_rows(rows: Tensor, num: int) -> Tensor:
    """The last of some rows ``[B, N]`` of each sample, whose number of them is its own."""
    return rows & (rows.flip(1).cumsum(dim=1).flip(1) <= num)


class RowKeeper(Protocol):
    """Keeps something per row of the cache in its memory of a prompt."""

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        """Go on with these rows."""


class PromptState:
    """
    Everything the engines keep between the forwards of one prompt.

    One state belongs to one key/value cache, so that interleaved generations do not see each other; a forward without a
    cache has a state of its own that ends with it.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.is_prefill = True
        self.stages: list[Stage] = []
        self.branches = 1
        """Readings of every row of the caller's batch: the row itself and the branches of a decoding method."""
        self.blocks = 1
        """How many of them the forward that read the prompt held, stacked block after block."""
        self.taken: Tensor | None = None
        """``[rows]`` first tokens that each row took from another row instead of reading them; None: none did."""
        self.readings: list[PromptState] = []
        """Of the same prompt, by branches that keep a cache of their own, as far as they have read it."""
        self.branch_steps: float | None = None
        """Share of decode steps on which decoding branches ran; None without branches."""
        self.notes: list[dict[str, Any]] = []
        """What a decoding method noted of the branches it made."""
        self.companion: Any = None
        """The reading of the prompt without images, while the prompt is read and some method asks for one."""
        self.vision: list[Any] = []
        self.num_queries = int(input_ids.shape[1])
        self.next_position: Tensor | None = None
        """``[B]`` position the first token after the prompt has in the unpatched model."""
        self.grown = 0
        """Columns that entered after the prompt: generated tokens and whatever was inserted between them."""
        self.coming: Tensor | None = None
        """``[B, new columns]`` bool for the coming step: False pads rows with fewer tokens; None when none has."""
        self.gaps = False
        """Some row has padding among what followed the prompt."""
        self.pressed: dict[int, Pressed] = {}
        """Decoder layers whose cache no longer holds what the layer's stage says of the prompt."""
        self.moved: dict[int, Tensor] = {}
        """Per layer, mean attention mass that edits moved in the prompt (total variation, in [0, 1])."""
        self.computing: dict[int, Any] = {}
        """Decoder layers that left out computation of the prompt, with the method that did."""
        self._layout: Layout | None = None
        self._memory: dict[Any, dict[Any, Any]] = {}

    @property
    def layout(self) -> Layout:
        """Layout of the prompt as given, before any reduction."""
        if self._layout is None:
            raise PromptError("the layout of the prompt is not known before the language model begins to read it")
        return self._layout

    def read(self, layout: Layout, mask: Tensor | None) -> None:
        """The prompt's layout is known: its first stage begins."""
        self._layout = layout
        self.stages = [Stage(0, layout, mask=mask)]

    def append_blocks(self, num: int) -> None:
        """As many more blocks of rows, which read the same tokens as the first, go on with it."""
        self.blocks += num
        self.readings.clear()
        self._layout = Layout.stack([self.layout] * self.blocks)
        for stage in self.stages:
            stage.layout = Layout.stack([stage.layout] * self.blocks)
            for name in ("index", "mask", "removed", "shift"):
                if (value := getattr(stage, name)) is not None:
                    setattr(stage, name, torch.cat([value] * self.blocks))
            stage.plans.clear()
            stage.scratch.clear()
        if self.next_position is not None:
            self.next_position = self.next_position.repeat(self.blocks)

    def memory(self, owner: Any) -> dict[Any, Any]:
        """Dictionary private to a method, empty at every new prompt."""
        return self._memory.setdefault(id(owner), {})

    def stage_at(self, layer: int) -> Stage:
        """The stage decoder layer ``layer`` sees."""
        for stage in reversed(self.stages):
            if stage.layer <= layer:
                return stage
        raise PromptError(f"no layout for decoder layer {layer}: the language model ran before its prompt was read")

    @property
    def cached(self) -> int:
        """Entries in the first layer's cache."""
        first = self.pressed.get(0)
        return self.stages[0].layout.length if first is None else first.length + self.grown

    def pressed_mask(self, layer: int) -> Tensor | None:
        """``[B, entries]`` padding mask of a compressed layer's cache at this step; None when nothing is padded."""
        held, first = self.pressed[layer], self.stages[0]
        if held.mask is None and not self.gaps:
            return None
        shape = (first.layout.batch, held.length)
        device = first.layout.segment.device if held.mask is None else held.mask.device
        before = torch.ones(shape, dtype=torch.bool, device=device) if held.mask is None else held.mask
        since = first.layout.valid[:, first.layout.length - self.grown :].to(device)
        return torch.cat([before, since], dim=1)

    def begin_step(self, num_queries: int, cached: int) -> None:
        """
        A forward that continues the prompt begins.

        Parameters
        ----------
        num_queries
            New tokens in this forward.
        cached
            Entries in the first layer's cache before it.

        Raises
        ------
        PromptError
            If the cache holds tokens this state never saw, or lost some of a prompt that was compressed.
        """
        self.is_prefill = False
        self.num_queries = num_queries
        known = self.cached
        if self.pressed and known - cached > self.grown:
            raise PromptError(
                f"{known - cached - self.grown} tokens that were read with the prompt are taken back, but its keys and "
                "values have been compressed since; generate without assisted decoding, whose first drafts come with "
                "the prompt (prompt_lookup_num_tokens, assistant_model)"
            )
        if cached < known:
            for stage in self.stages:
                stage.shrink(known - cached)
            self.grown -= known - cached
        elif cached > known:
            raise PromptError(
                f"the cache holds {cached} tokens of which the patch saw {known}; "
                "run the whole prompt under the patch, or start from an empty cache"
            )
        for stage in self.stages:
            stage.scratch.clear()
            stage.grow(num_queries, self.coming)
        self.gaps |= self.coming is not None
        self.coming = None
        self.grown += num_queries
