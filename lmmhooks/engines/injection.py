"""
Shows the model its images again while it answers: tokens are inserted behind the newest one, in that token's forward.

What is inserted for a row is made when its prompt is read: bridge text and the visual states that enter the decoder,
pooled. In the step it is due, the forward gets more columns than ``generate`` knows of (rows that are not due, or
insert fewer, are padded on the left), the logits come from the last one, and later steps are handed positions and masks
that count what was inserted. For every other engine this is a continuation by several tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.branch_cache import BranchCache
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.layout import VisualSpan
from lmmhooks.methods.reduction.injecting import InjectionMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["InjectionEngine"]

TAIL = 32
"""Generated tokens whose text a method sees."""


@dataclass(frozen=True, eq=False)
class _Insert:
    """
    What is inserted for one row.

    Attributes
    ----------
    states
        ``[S, D]`` embeddings.
    offsets
        ``[A, S]`` positions after that of the token it follows, per axis.
    extent
        By how much the position of the token after it grows.
    visual
        ``[S]`` bool: image tokens.
    deepstack
        Per decoder layer that adds visual features once more, those of the image tokens.
    """

    states: Tensor
    offsets: Tensor
    extent: int
    visual: Tensor
    deepstack: list[Tensor]


class InjectionEngine:
    """
    Attaches one method that inserts images into answers.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    methods
        Exactly one: `check_composition` refuses several.

    Raises
    ------
    MethodError
        The method needs a tokenizer, and ``wrap`` was given no processor.
    """

    def __init__(self, runtime: Runtime, methods: Sequence[InjectionMethod]) -> None:
        self.runtime = runtime
        self.family = runtime.family
        [self.method] = methods
        self._names = list(inspect.signature(self.family.core.forward).parameters)
        if runtime.tokenizer is None and (isinstance(self.method.bridge, str) or self.method.reads_text):
            raise MethodError(
                f"{self.method.id} needs the model's processor for its bridge text and markers; pass "
                "wrap(model, ..., processor=processor), or token ids as bridge and a trigger without markers"
            )

    def attach(self, attachments: Attachments) -> None:
        """Hook model, decoder and head; must come after what follows prompts and before what shortens them."""
        family = self.family
        # First of all: what follows prompts has to count the tokens that are inserted.
        attachments.pre_hook(family.core, self._enter_core, "multimodal model (injection)", first=True)
        attachments.pre_hook(family.text_model, self._enter_text, "language model (injection)")
        attachments.pre_hook(family.lm_head, self._enter_head, "output head (injection)")
        if self.method.reads_text:
            attachments.attribute(family.model, "_reorder_cache", self._refuse_beams, "model._reorder_cache")

    def _refuse_beams(self, cache: Any, beam_idx: Tensor) -> Any:
        raise PromptError(
            f"{self.method.id} with markers follows the words of every row, which beams exchange; "
            "use another trigger, or generate without beams"
        )

    # -- when the prompt is read --------------------------------------------------------------------------------------

    def _enter_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.runtime.current
        if state is None:
            return None
        memory = state.memory(self)
        if state.is_prefill:
            if any(span.modality == "image" and len(span) for span in state.layout.spans):
                memory["inserts"] = self._prepare(state, kwargs)
                memory["last"] = [None] * state.layout.batch
                memory["count"] = [0] * state.layout.batch
            return None
        if "skipped" not in memory:
            return None
        # generate() counts its own tokens only.
        return args, {**kwargs, "attention_mask": state.stages[0].mask, **memory.pop("visual", {})}

    def _prepare(self, state: PromptState, kwargs: dict[str, Any]) -> list[_Insert | None]:
        embeddings = kwargs["inputs_embeds"]
        mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds") or []
        rank = None if mask is None else mask.flatten().cumsum(dim=0).view_as(mask) - 1
        bridge = self._embed(self._bridge(), embeddings)
        inserts: list[_Insert | None] = []
        for row in range(state.layout.batch):
            spans = [span for span in state.layout.spans_of(row) if span.modality == "image" and len(span)]
            pooled = [self._pool(span, embeddings, rank, features) for span in spans]
            inserts.append(self._line_up(bridge, pooled) if pooled else None)
        return inserts

    def _pool(
        self, span: VisualSpan, embeddings: Tensor, rank: Tensor | None, features: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """States ``[M, D]`` of an image made smaller, their cells ``[2, M]``, and their deepstack features."""
        pooling = self.method.pool(span.tokens)
        weights = pooling.weights.to(embeddings.device)
        position = span.positions.to(embeddings.device)
        cells = torch.stack([pooling.row, pooling.col]).to(embeddings.device)
        states = (weights @ embeddings[span.sample, position].float()).to(embeddings.dtype)
        extra = []
        for feature in features:
            assert rank is not None
            own = feature[rank[span.sample, position].to(feature.device)].float()
            extra.append((weights.to(own.device) @ own).to(feature.dtype))
        return states, cells, extra

    def _line_up(self, bridge: Tensor, images: Sequence[tuple[Tensor, Tensor, list[Tensor]]]) -> _Insert:
        """Bridge and images one after the other, images between the tokens that mark them where the model has such."""
        config = self.family.model.config
        marks = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        before, after = (self._embed([] if mark is None else [mark], bridge) for mark in marks)
        axes = 3 if self.family.mrope else 1
        states, offsets, visual = [], [], []
        place = 1

        def text(tokens: Tensor) -> None:
            nonlocal place
            states.append(tokens)
            offsets.append(torch.arange(place, place + len(tokens), device=tokens.device).expand(axes, -1))
            visual.append(torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device))
            place += len(tokens)

        text(bridge)
        for image, cells, _ in images:
            text(before)
            states.append(image)
            visual.append(torch.ones(len(image), dtype=torch.bool, device=image.device))
            if self.family.mrope:
                # An image has one time, and counts as many positions as its longer side.
                offsets.append(torch.cat([torch.zeros_like(cells[:1]), cells]) + place)
                place += int(cells.max()) + 1
            else:
                offsets.append(torch.arange(place, place + len(image), device=image.device)[None])
                place += len(image)
            text(after)
        deepstack = [torch.cat(parts) for parts in zip(*(extra for _, _, extra in images), strict=True)]
        return _Insert(torch.cat(states), torch.cat(offsets, dim=1), place - 1, torch.cat(visual), deepstack)

    def _bridge(self) -> Sequence[int]:
        bridge = self.method.bridge
        if isinstance(bridge, str):
            return self.runtime.tokenizer(bridge, add_special_tokens=False)["input_ids"]
        return bridge

    def _embed(self, ids: Sequence[int], like: Tensor) -> Tensor:
        """Embeddings ``[n, D]`` of some tokens, with the device and dtype of other embeddings."""
        table = self.family.model.get_input_embeddings()
        tokens = torch.tensor(list(ids), dtype=torch.long, device=table.weight.device)
        return table(tokens).to(like.device, like.dtype)

    # -- while the answer is generated --------------------------------------------------------------------------------

    def _enter_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        state = self.runtime.state_of(cache)
        if state is None or not state.memory(self).get("inserts"):
            return None
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = kwargs.get("input_ids")
        num_new = int((kwargs["inputs_embeds"] if tokens is None else tokens).shape[1])
        memory = state.memory(self)
        if num_new == 1 and tokens is not None:
            due = self._due(state, memory, tokens)
            if any(due):
                return (), self._insert(state, memory, kwargs, due)
        if "skipped" not in memory:
            return None
        assert state.next_position is not None
        positions = kwargs.get("position_ids")
        if num_new > 1 and positions is not None and not isinstance(cache, BranchCache):
            self._refuse_rewound(state, memory, positions)
        now = state.next_position + state.grown
        steps = now[:, None] + torch.arange(num_new, device=now.device)
        axes = 1 if positions is None or positions.dim() < 3 else positions.shape[0]
        kwargs["position_ids"] = steps if axes == 1 else steps.expand(axes, -1, -1)
        return (), kwargs

    def _due(self, state: PromptState, memory: dict[Any, Any], tokens: Tensor) -> list[bool]:
        generated = state.grown - memory.get("columns", 0) + 1
        texts = [""] * len(tokens)
        if self.method.reads_text:
            words = torch.cat([memory.get("words", tokens[:, :0].cpu()), tokens.cpu()], dim=1)[:, -TAIL:]
            memory["words"] = words
            texts = [self.runtime.tokenizer.decode(row) for row in words.tolist()]
        rows = zip(memory["inserts"], memory["count"], memory["last"], texts, strict=True)
        return [
            insert is not None
            and count < self.method.max_injections
            and self.method.due(generated, None if last is None else generated - last, text)
            for insert, count, last, text in rows
        ]

    def _insert(
        self, state: PromptState, memory: dict[Any, Any], kwargs: dict[str, Any], due: Sequence[bool]
    ) -> dict[str, Any]:
        """Arguments of a forward that reads the newest token and, in the rows that are due, what is inserted."""
        assert state.next_position is not None
        inserts: list[_Insert | None] = [
            insert if is_due else None for insert, is_due in zip(memory["inserts"], due, strict=True)
        ]
        newest = self.family.model.get_input_embeddings()(kwargs.pop("input_ids"))
        batch, _, width = newest.shape
        columns = 1 + max(len(insert.states) for insert in inserts if insert is not None)
        now = (state.next_position + state.grown).to(newest.device)
        embeds = newest.new_zeros(batch, columns, width)
        valid = torch.zeros(batch, columns, dtype=torch.bool, device=newest.device)
        visual = torch.zeros_like(valid)
        positions = now[None, :, None].repeat(3 if self.family.mrope else 1, 1, columns)
        for row, insert in enumerate(inserts):
            start = columns - 1 - (0 if insert is None else len(insert.states))
            valid[row, start:] = True
            embeds[row, start] = newest[row, 0]
            if insert is not None:
                embeds[row, start + 1 :] = insert.states
                visual[row, start + 1 :] = insert.visual
                positions[:, row, start + 1 :] += insert.offsets
        extents = [0 if insert is None else insert.extent for insert in inserts]
        lengths = [0 if insert is None else len(insert.states) for insert in inserts]
        self._count(state, memory, due, extents, columns)
        state.coming = None if min(lengths) == columns - 1 else valid
        memory["visual"] = {}
        if deepstack := [insert.deepstack for insert in inserts if insert is not None and insert.deepstack]:
            features = [torch.cat(parts) for parts in zip(*deepstack, strict=True)]
            memory["visual"] = {"visual_pos_masks": visual, "deepstack_visual_embeds": features}
        memory["cut_head"] = True
        kwargs["inputs_embeds"] = embeds
        kwargs["attention_mask"] = None
        kwargs["position_ids"] = self._axes(positions, valid, now, kwargs.get("position_ids"))
        return {name: value for name, value in kwargs.items() if name not in ("mm_token_type_ids", "token_type_ids")}

    def _count(
        self, state: PromptState, memory: dict[Any, Any], due: Sequence[bool], extents: Sequence[int], columns: int
    ) -> None:
        """Note what is about to be inserted, so that positions go on behind it."""
        assert state.next_position is not None
        generated = state.grown - memory.get("columns", 0) + 1
        grown = state.next_position.new_tensor(extents)
        memory["skipped"] = memory.get("skipped", torch.zeros_like(grown)) + grown
        memory["columns"] = memory.get("columns", 0) + columns - 1
        memory["count"] = [count + is_due for count, is_due in zip(memory["count"], due, strict=True)]
        memory["last"] = [generated if is_due else last for last, is_due in zip(memory["last"], due, strict=True)]
        # The next position is counted by columns, of which some are padding and some share their position.
        state.next_position = state.next_position + grown + 1 - columns

    def _axes(self, positions: Tensor, valid: Tensor, now: Tensor, given: Tensor | None) -> Tensor:
        """Positions in the form the caller uses: one axis, three, or three behind a count of tokens."""
        if not self.family.mrope:
            return positions[0]
        if given is None or given.dim() < 3 or given.shape[0] == 3:
            return positions
        count = now[:, None] + (valid.cumsum(dim=1) - 1).clamp(min=0)
        return torch.cat([count[None], positions])

    def _refuse_rewound(self, state: PromptState, memory: dict[Any, Any], positions: Tensor) -> None:
        """Several tokens whose positions the caller counted by the cache, which holds what was inserted."""
        assert state.next_position is not None
        first = positions[-1] if positions.dim() == 3 else positions
        expected = state.next_position + state.grown - memory["skipped"]
        if bool((first[:, 0] != expected.to(first.device)).any()):
            raise PromptError(
                f"{positions.shape[-1]} new tokens begin at position {int(first[:, 0].max())} instead of "
                f"{int(expected.max())}: generate() continues an earlier cache by its length, which holds images that "
                f"{self.method.id} inserted; pass the whole conversation with an empty cache"
            )

    def _enter_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Logits of the last column only: one per forward of one token, as the caller expects."""
        state = self.runtime.last
        # Methods use the head on their own states while the decoder runs.
        if self.runtime.current is not None or state is None or not state.memory(self).pop("cut_head", False):
            return None
        if args:
            return (args[0][:, -1:], *args[1:]), kwargs
        return args, {name: value[:, -1:] for name, value in kwargs.items()}
