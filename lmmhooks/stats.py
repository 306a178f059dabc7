"""What a patch did to the newest prompt, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lmmhooks import cost
from lmmhooks.engines.skipping import prompt_tokens

if TYPE_CHECKING:
    from lmmhooks.engines.state import PromptState
    from lmmhooks.family import Family

__all__ = ["LayerStats", "Stats"]


@dataclass(frozen=True)
class LayerStats:
    """
    One decoder layer, one prompt batch.

    Attributes
    ----------
    layer
        0-based.
    visual_in
        Visual tokens of the prompt as given, per row of the batch.
    visual_kept
        Visual tokens that entered this layer, per row.
    kv_bytes
        Bytes of keys and values this layer holds for the prompt, all rows, padding included.
    moved
        Mean attention mass that edits moved in the edited prompt rows (total variation, 0 to 1), None without edits.
    """

    layer: int
    visual_in: tuple[int, ...]
    visual_kept: tuple[int, ...]
    kv_bytes: int
    moved: float | None


@dataclass(frozen=True)
class Stats:
    """
    Cost of the newest prompt under the active patches.

    Attributes
    ----------
    layers
        One entry per decoder layer.
    average_visual
        Visual tokens per decoder layer and row, averaged over both: the figure pruning papers quote.
    kv_bytes, kv_bytes_full
        Bytes of the prompt's keys and values as they were run, branches included, and without any method.
    prefill_flops, prefill_flops_full
        Theoretical decoder FLOPs of the prompts as they were run, branches included as far as they have read the
        prompt, and without any method; padding not counted, pairs by the "square" convention. What a branch takes from
        the main rows instead of reading it is counted once. A description that a method asks for first is not counted.
    branches
        Rows of the forward per row of the batch: 1 without branches.
    branch_steps
        Share of decode steps on which the branches ran; None without a decoding method.
    notes
        What a decoding method noted of the images and wordings it made for its branches.
    """

    layers: tuple[LayerStats, ...]
    average_visual: float
    kv_bytes: int
    kv_bytes_full: int
    prefill_flops: float
    prefill_flops_full: float
    branches: int = 1
    branch_steps: float | None = None
    notes: tuple[dict[str, Any], ...] = ()

    @property
    def flops_saved(self) -> float:
        """Share of the theoretical prefill FLOPs that is saved; negative when branches cost more."""
        return 1.0 - self.prefill_flops / self.prefill_flops_full if self.prefill_flops_full else 0.0

    @classmethod
    def of(cls, family: Family, state: PromptState) -> Stats:
        """
        Read the statistics off the state of a prompt. Synchronises with the device once per stage.

        Parameters
        ----------
        family
            The model family.
        state
            A state whose prompt has been read.
        """
        shape = cost.DecoderShape.from_config(family.text_config)
        layers, flops = _read(family, shape, state)
        kv_bytes = sum(layer.kv_bytes for layer in layers)
        for reading in state.readings:
            others, more = _read(family, shape, reading)
            flops += more
            kv_bytes += sum(layer.kv_bytes for layer in others)
        main = state.layout.batch // state.blocks
        visual = layers[0].visual_in[:main]
        text = [n - v for n, v in zip(_row_counts(state.layout.valid), visual, strict=False)]
        flops_full = sum(
            2 * cost.prefill_macs(shape, cost.dense_counts(num_text, [num_visual] * shape.layers))
            for num_text, num_visual in zip(text, visual, strict=True)
        )
        counts = [count for layer in layers for count in layer.visual_kept]
        return cls(
            layers=tuple(layers),
            average_visual=sum(counts) / len(counts),
            kv_bytes=kv_bytes,
            kv_bytes_full=state.layout.length * main * _token_bytes(family, shape) * shape.layers,
            prefill_flops=flops,
            prefill_flops_full=flops_full,
            branches=state.branches,
            branch_steps=state.branch_steps,
            notes=tuple(state.notes),
        )

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON-compatible values, with ``flops_saved``."""
        return {**asdict(self), "flops_saved": self.flops_saved}


def _token_bytes(family: Family, shape: cost.DecoderShape) -> int:
    return 2 * shape.kv_width * next(family.text_model.parameters()).element_size()


def _read(family: Family, shape: cost.DecoderShape, state: PromptState) -> tuple[list[LayerStats], float]:
    """Layer by layer what all rows of one reading of a prompt came to, and its FLOPs."""
    visual_in = _row_counts(state.layout.visual)
    text = [n - v for n, v in zip(_row_counts(state.layout.valid), visual_in, strict=True)]
    # Several layers share a stage; count each stage once.
    kept_at = {stage.layer: _row_counts(stage.layout.visual) for stage in state.stages}
    computing = {state.stage_at(layer).layer for layer in state.computing}
    prompts = {stage.layer: prompt_tokens(stage.layout) for stage in state.stages if stage.layer in computing}
    per_token = _token_bytes(family, shape)
    layers = []
    for layer in range(shape.layers):
        stage = state.stage_at(layer)
        pressed = state.pressed.get(layer)
        length = stage.layout.length - state.grown if pressed is None else pressed.length
        moved = state.moved.get(layer)
        layers.append(
            LayerStats(
                layer,
                visual_in,
                kept_at[stage.layer],
                length * len(visual_in) * per_token,
                None if moved is None else float(moved),
            )
        )
    flops = 0.0
    taken = [0] * len(text) if state.taken is None else [int(number) for number in state.taken.tolist()]
    for row, num_text in enumerate(text):
        counts_of = cost.dense_counts(num_text, [layer.visual_kept[row] for layer in layers])
        for layer, method in state.computing.items():
            tokens = prompts[state.stage_at(layer).layer][row][1]
            if tokens.num_visual:
                counts_of[layer] = method.layer_counts(family, layer, row, tokens, state.memory(method))
        flops += 2 * cost.prefill_macs(shape, counts_of)
        # What a row takes from another one was computed there: its tokens, and the pairs among them.
        flops -= 2 * cost.prefill_macs(shape, [cost.LayerCounts.dense(taken[row])] * shape.layers)
    return layers, flops


def _row_counts(mask: Any) -> tuple[int, ...]:
    return tuple(int(count) for count in mask.sum(dim=1).tolist())
