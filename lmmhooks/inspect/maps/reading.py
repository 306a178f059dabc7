"""Passes over a prompt: an answer with the rows that choose its tokens, and how probable it is of other pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.runtime import Runtime, find_runtime
from lmmhooks.errors import PromptError
from lmmhooks.inspect.answer_rows import AnswerRow, AnswerRows
from lmmhooks.inspect.maps.measures import entropy, favouring, within_image
from lmmhooks.inspect.maps.replay import Replay
from lmmhooks.inspect.maps.states import NormedStates
from lmmhooks.layout import Layout, Segment, VisualSpan
from lmmhooks.patch import wrap
from lmmhooks.prompting import Prompter, build_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks.engines.state import PromptState

__all__ = ["Answered", "LayerRow", "Passes", "watching"]

MAX_POSITIONS = 1500
"""Positions of a prompt and its answer up to which whole attention matrices are held (float32, per layer)."""

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True, eq=False)
class LayerRow:
    """
    One row of one layer over the n visual tokens of an image; tensors on the CPU.

    Attributes
    ----------
    spans
        ``[4]`` attention on system, visual, instruction and generated positions, mean over all heads.
    share, within
        ``[n]`` mean over the chosen heads of the raw row, and of the within-image row; NaN for tokens that are gone.
    by_head
        float16 ``[H', n]`` raw rows of the chosen heads; None unless wanted.
    entropy
        Of the mean over all heads, in nats.
    favoured
        Long ``[n]``: heads, of all, that favour a token; see `lmmhooks.inspect.maps.measures.favouring`.
    mean
        ``[n]`` raw row, mean over all heads.
    """

    spans: Tensor
    share: Tensor
    within: Tensor
    by_head: Tensor | None
    entropy: Tensor
    favoured: Tensor
    mean: Tensor


@dataclass(frozen=True, eq=False)
class Answered:
    """
    A prompt that was answered.

    Attributes
    ----------
    prompt_ids, new_ids
        Tokens read, as the model was given them, and tokens generated, the one that ends the answer included.
    probabilities, ranks
        Of the new tokens, raw: before warpers and processors. 1 is the rank of the most probable.
    rows
        Per new token and layer, the row that chose it; layers that could not be read are missing.
    layout, span
        Of the prompt, and of the image in it.
    states
        ``[positions, D]`` after the final norm: of all positions of the prompt, then of the tokens generated but the
        last; None unless wanted.
    """

    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    probabilities: Tensor
    ranks: Tensor
    rows: tuple[dict[int, LayerRow], ...]
    layout: Layout
    span: VisualSpan
    states: Tensor | None

    def stacked(self, name: str, num_layers: int) -> Tensor:
        """What every row says of ``name``: ``[T, L, ...]``, NaN for layers that could not be read."""
        known = next(getattr(row, name) for rows in self.rows for row in rows.values())
        out = torch.full((len(self.rows), num_layers, *known.shape), torch.nan)
        for t, rows in enumerate(self.rows):
            for layer, row in rows.items():
                out[t, layer] = getattr(row, name)
        return out


class Passes:
    """
    Passes of a model over prompts about the same images.

    Parameters
    ----------
    model
        Wrapped so that attention can be read; see `watching`.
    processor
        Its processor.
    images
        Of the prompt, RGB.
    prompt
        The question.
    """

    def __init__(self, model: nn.Module, processor: Any, images: Sequence[Image], prompt: str) -> None:
        runtime = find_runtime(model)
        assert runtime is not None, "the model is wrapped"
        self.runtime: Runtime = runtime
        self.model: Any = model
        self.processor = processor
        self.images = list(images)
        self.prompt = prompt

    def inputs(self, prompt: str | None = None) -> dict[str, Any]:
        """Model inputs of the question, or of another one about the same images."""
        weight = next(self.model.parameters())
        wanted = self.prompt if prompt is None else prompt
        return build_inputs(self.processor, self.images, wanted, weight.device, weight.dtype)

    def answer(
        self,
        image: int,
        max_new_tokens: int,
        heads: Sequence[int],
        *,
        prompt: str | None = None,
        keep_heads: bool = False,
        states: bool = False,
    ) -> Answered:
        """
        Answer greedily and read the rows that choose the tokens.

        Parameters
        ----------
        image
            Ordinal of the image whose tokens are looked at.
        max_new_tokens
            Tokens of the answer at most.
        heads
            That shares are averaged over.
        prompt
            The question; None for that of the passes.
        keep_heads, states
            Whether to keep rows of single heads, and states after the final norm.
        """
        runtime, inputs = self.runtime, self.inputs(prompt)
        chosen = torch.tensor(list(heads))

        def keep(row: AnswerRow, state: PromptState) -> LayerRow | None:
            spans = state.layout.spans_of(0)
            # A decoding method may read the prompt without its image beside it.
            return _summed_up(row, spans[image], chosen, keep_heads) if image < len(spans) else None

        collected = AnswerRows(runtime, keep)
        watcher = NormedStates(runtime)
        with runtime.probing(collected.probes), watcher.attached() if states else nullcontext(), torch.no_grad():
            out = self.model.generate(
                **inputs, **GREEDY, max_new_tokens=max_new_tokens, return_dict_in_generate=True, output_logits=True
            )
            # Read before the probes go: changing what is attached drops the state of the prompt.
            state, steps = runtime.last_state, collected.steps()
            normed = watcher.joined(state) if states else None
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        logits = torch.stack([step[0] for step in out.logits]).float().cpu()
        own = logits.gather(1, new.cpu()[:, None])
        return Answered(
            prompt_ids=tuple(state.input_ids[0].tolist()),
            new_ids=tuple(new.tolist()),
            probabilities=logits.softmax(dim=-1).gather(1, new.cpu()[:, None])[:, 0],
            ranks=(logits > own).sum(dim=1) + 1,
            rows=tuple({layer: row for layer, row in step.items() if row is not None} for step in steps[: len(new)]),
            layout=state.layout,
            span=state.layout.spans_of(0)[image],
            states=normed,
        )

    def replay(self, prompt: str | None = None) -> Replay:
        """Read the prompt again and go on with tokens of the caller's choice."""
        return Replay(self.model, self.inputs(prompt))

    def log_probabilities(
        self, pictures: Sequence[Image], image: int, new_ids: Sequence[int], batch: int = 8
    ) -> Tensor:
        """
        How probable an answer is when the question is about other pictures.

        Parameters
        ----------
        pictures
            Each in the place of image number ``image``, and of its size.
        new_ids
            The answer, T tokens.
        batch
            Pictures in a forward.

        Returns
        -------
        Tensor
            float32 ``[pictures, T]``: log-probability of each token after those before it.
        """
        weight = next(self.model.parameters())
        found = []
        for start in range(0, len(pictures), batch):
            shown = [[*self.images[:image], one, *self.images[image + 1 :]] for one in pictures[start : start + batch]]
            prompts = [self.prompt] * len(shown)
            inputs = Prompter(self.processor).inputs(shown, prompts, weight.device, weight.dtype)
            replay = Replay(self.model, inputs)
            with torch.no_grad():
                steps = [replay.read()]
                for token in new_ids[:-1]:
                    steps.append(replay.step(token))
                logits = torch.stack(steps, dim=1).float().log_softmax(dim=-1)
            wanted = torch.tensor(list(new_ids), device=logits.device).expand(len(shown), -1)
            found.append(logits.gather(2, wanted[..., None])[..., 0].cpu())
        return torch.cat(found)

    def check_inserted(self, num_tokens: int, kind: str) -> None:
        """Refuse matrices of answers between whose ``num_tokens`` tokens a method has inserted others."""
        if self.runtime.last_state.grown != num_tokens:
            raise PromptError(
                f"a method on the model inserts tokens into the answer, whose places kind={kind!r} cannot tell apart; "
                "use kind='raw', or fewer tokens with max_new_tokens"
            )

    def check_length(self, length: int, kind: str) -> None:
        """Refuse kinds that hold whole attention matrices on long prompts."""
        if length > MAX_POSITIONS:
            raise PromptError(
                f"kind={kind!r} holds whole attention matrices, for up to {MAX_POSITIONS} positions, and prompt and "
                f"answer have {length}; use a smaller image or kind='raw', 'grad' or 'tam'"
            )


@contextmanager
def watching(model: nn.Module, processor: Any) -> Iterator[None]:
    """The model with something on it that goes through every hook: its own methods, or for now the identity."""
    runtime = find_runtime(model)
    if runtime is not None and runtime.methods():
        yield
        return
    with wrap(model, "attention-identity", processor=processor):
        yield


def _summed_up(row: AnswerRow, span: VisualSpan, heads: Tensor, keep_heads: bool) -> LayerRow | None:
    if row.segment is None or row.position is None:
        return None  # its cache was compressed
    weights = row.weights
    segment = row.segment.to(weights.device)
    mean = weights.mean(dim=0)
    kinds = (Segment.SYSTEM, Segment.VISUAL, Segment.INSTRUCTION, Segment.GENERATED)
    spans = torch.stack([mean[segment == kind].sum() for kind in kinds])
    place = torch.full((int(max(row.position.max(), span.positions.max())) + 1,), -1)
    place[row.position] = torch.arange(len(row.position))
    columns = place[span.positions]
    gone = (columns < 0).to(weights.device)
    shares = weights[:, columns.clamp(min=0).to(weights.device)].masked_fill(gone, torch.nan)
    chosen = shares[heads.to(weights.device)]
    overall = shares.mean(dim=0)
    return LayerRow(
        spans=spans.cpu(),
        share=chosen.mean(dim=0).cpu(),
        within=within_image(chosen).mean(dim=0).cpu(),
        by_head=chosen.half().cpu() if keep_heads else None,
        entropy=entropy(overall).cpu(),
        favoured=favouring(shares, weights.shape[1]).cpu(),
        mean=overall.cpu(),
    )
