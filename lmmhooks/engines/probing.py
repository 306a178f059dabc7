"""What reducers score tokens by: attention read in tower and decoder, as one number per position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmmhooks.engines.probes import DecoderProbe, VisionProbe
from lmmhooks.engines.sequences import gather_last
from lmmhooks.engines.state import PromptState, Stage
from lmmhooks.errors import PromptError
from lmmhooks.layout import Layout
from lmmhooks.methods.probe import Probe

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["Readings", "place"]


@dataclass(frozen=True)
class _PatchListener:
    """
    Notes what a vision probe reads in the encoder call that is under way.

    Equal for one signal whoever asks for it: the engine listens once, or everything would be noted twice.
    """

    runtime: Runtime
    name: str

    def __call__(self, attention: Tensor) -> None:
        self.runtime.readings.setdefault(self.name, []).append(attention.mean(dim=1))


class Readings:
    """
    Collects what probes read, and hands it out in the coordinates of the sequence a cut sees.

    Attributes
    ----------
    decoder_probes, vision_probes
        For the attention engine; a signal that several methods want is read once.
    """

    def __init__(self, runtime: Runtime, probes: Iterable[Probe]) -> None:
        self.runtime = runtime
        self.decoder_probes: list[DecoderProbe] = []
        self.vision_probes: list[VisionProbe] = []
        for probe in {probe.name: probe for probe in probes}.values():
            if probe.signal == "decoder_rows":
                hear = partial(self._hear_rows, probe.name)
                self.decoder_probes.append(DecoderProbe(probe.layer, probe.rows, hear))
            else:
                kind = probe.signal.removeprefix("vision_")
                self.vision_probes.append(VisionProbe(probe.layer, kind, _PatchListener(runtime, probe.name)))

    def values(self, probe: Probe, state: PromptState, stage: Stage) -> Tensor:
        """
        What a probe read in this prompt.

        Parameters
        ----------
        probe
            One of those given on construction.
        state
            The prompt.
        stage
            The sequence in whose coordinates to answer.

        Returns
        -------
        Tensor
            ``[B, N]``; NaN at positions the tower knows nothing of, for vision probes.

        Raises
        ------
        PromptError
            The image was encoded outside the patch, so that nothing was read.
        """
        if probe.signal != "decoder_rows":
            full = self._vision(probe.name, state)
            return full if stage.index is None else gather_last(full, stage.index)
        total, count = state.memory(self)[probe.name]
        scores = total / count.clamp(min=1)[:, None]
        seen = state.stage_at(probe.layer)
        if seen is stage or stage.index is None:
            return scores
        # Another reducer cut between the layer that was read and this one.
        if seen.index is not None:
            length = state.layout.length
            full = scores.new_zeros(scores.shape[0], length + 1)
            scores = full.scatter(1, seen.index.masked_fill(seen.index < 0, length), scores)
        return gather_last(scores, stage.index)

    def _hear_rows(self, name: str, weights: Tensor, members: Tensor) -> None:
        state = self.runtime.current
        assert state is not None
        # A product with the row mask sums rows without a second tensor of the size of the weights.
        rows = members.to(weights.dtype)[:, None, :, None]
        total = torch.matmul(weights.transpose(2, 3), rows).squeeze(-1).mean(dim=1)
        memory = state.memory(self)
        before, count = memory.get(name, (0, 0))
        memory[name] = before + total, count + members.sum(dim=1)

    def _vision(self, name: str, state: PromptState) -> Tensor:
        memory = state.memory(self)
        if name in memory:
            return memory[name]
        per_image: dict[str, list[Tensor]] = {}
        for vision in state.vision:
            if name not in vision.probes:
                raise PromptError(
                    f"the {vision.modality} was encoded outside the patch, so attention in the vision tower was not "
                    "read; pass the pixels to the patched model instead of encoder outputs"
                )
            per_image[vision.modality] = self.runtime.family.tower_to_tokens(vision.probes[name], vision)
        memory[name] = place(state.layout, per_image)
        return memory[name]


def place(layout: Layout, per_image: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """
    Values per image as values per position of a prompt.

    Parameters
    ----------
    layout
        Of the prompt as given.
    per_image
        By modality, one tensor ``[tokens]`` per image of the encoder call, as `Family.tower_to_tokens` returns them.

    Returns
    -------
    Tensor
        ``[B, N]`` float32; NaN at positions that belong to no image.

    Raises
    ------
    PromptError
        The attention mask hides part of an image.
    """
    values = []
    for span in layout.spans:
        scores = per_image[span.modality][span.source]
        if len(scores) != len(span):
            raise PromptError(
                f"{span.modality} {span.image} of row {span.sample} has {len(scores)} tokens, of which the "
                f"attention mask hides {len(scores) - len(span)}; mask whole images or none of their tokens"
            )
        values.append(scores.float())
    device = values[0].device if values else layout.segment.device
    full = torch.full((layout.batch, layout.length), float("nan"), device=device)
    if values:
        sample = torch.cat([torch.full((len(span),), span.sample) for span in layout.spans])
        position = torch.cat([span.positions for span in layout.spans])
        full[sample.to(device), position.to(device)] = torch.cat([value.to(device) for value in values])
    return full
