"""What reducers score tokens by: readings of tower and decoder, in the coordinates of the sequence a cut sees."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.grouping import inverse_index
from lmmhooks.engines.probes import DecoderProbe, VisionProbe
from lmmhooks.engines.state import PromptState, Stage
from lmmhooks.errors import PromptError
from lmmhooks.layout import Layout
from lmmhooks.methods.probe import Probe, RowsRead

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit
    from lmmhooks.engines.runtime import Runtime

__all__ = ["Readings", "place", "transport"]

#: Signals read from outputs of vision layers; the others of the tower are read from its attention calls.
_OUTPUTS = ("vision_states", "vision_cls_state")


@dataclass(frozen=True)
class _PatchListener:
    """
    Notes what a vision probe reads in the encoder call that is under way.

    Equal for one signal whoever asks for it: the engine listens once, or everything would be noted twice.
    """

    runtime: Runtime
    name: str

    def __call__(self, reading: Tensor) -> None:
        """Attention ``[crops, H, patches]`` or keys ``[crops, H, patches, d]``."""
        if reading.dim() == 3:
            value = reading.mean(dim=1)[..., None]
        else:
            value = reading.transpose(1, 2).flatten(2)
        self.runtime.readings.setdefault(self.name, []).append(value)


class Readings:
    """
    Collects what probes read, and hands it out in the coordinates of the sequence a cut sees.

    Attributes
    ----------
    decoder_probes, vision_probes
        For the attention engine; a signal that several methods want is read once.
    """

    def __init__(self, runtime: Runtime, probes: Iterable[Probe], peeked: Container[str] = ()) -> None:
        """``peeked``: names of attention probes that somebody else feeds through `hear_rows`."""
        self.runtime = runtime
        self.probes = {probe.name: probe for probe in probes}
        self.decoder_probes: list[DecoderProbe] = []
        self.vision_probes: list[VisionProbe] = []
        for probe in self.probes.values():
            if probe.signal == "decoder_rows" and probe.name not in peeked:
                self.decoder_probes.append(DecoderProbe(probe.layer, probe.rows, hears=partial(self.hear_rows, probe)))
            elif probe.signal.startswith("vision") and probe.signal not in _OUTPUTS:
                kind = probe.signal.removeprefix("vision_")
                listener = _PatchListener(runtime, probe.name)
                self.vision_probes.append(VisionProbe(probe.layer, kind, listener, probe.of_map))

    def attach(self, attachments: Attachments) -> None:
        """Hook the layers whose inputs or outputs are read; must come after the hooks that shorten sequences."""
        family = self.runtime.family
        for probe in self.probes.values():
            if probe.signal == "decoder_states":
                hook = partial(self._hear_states, probe.name)
                attachments.pre_hook(family.layers[probe.layer], hook, f"input of decoder layer {probe.layer} (read)")
            elif probe.signal in _OUTPUTS:
                what = f"output of vision layer {probe.layer} ({probe.name})"
                # Another engine may listen already; everything would be noted twice.
                if what not in attachments.described:
                    attachments.hook(family.vision_layers[probe.layer], partial(self._hear_tower, probe), what)

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
            ``[B, N]``, or ``[B, N, C]`` for probes that are no scalars; NaN at positions the tower knows nothing of,
            for readings of the tower.

        Raises
        ------
        PromptError
            The image was encoded outside the patch, so that nothing was read.
        """
        if not probe.signal.startswith("decoder"):
            full = self._vision(probe, state)
            return full if stage.index is None else transport(full, state.stages[0].layout.length, None, stage.index)
        memory = state.memory(self)
        if probe.signal == "decoder_states":
            seen, value = memory[probe.name]
        else:
            seen, total, count = memory[probe.name]
            value = total / count.clamp(min=1)[:, None] if probe.reduce is None else total
        if seen is stage or stage.index is None:
            return value
        # Another reducer cut between the layer that was read and this one.
        return transport(value, state.layout.length, seen.index, stage.index)

    # -- the decoder --------------------------------------------------------------------------------------------------

    def hear_rows(self, probe: Probe, weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
        """Take in a block of attention rows of a layer."""
        memory = edit.state.memory(self)
        if probe.reduce is None:
            # A product with the row mask sums rows without a second tensor of the size of the weights.
            summed = torch.matmul(weights.transpose(2, 3), members.to(weights.dtype)[:, None, :, None])
            part = summed.squeeze(-1).mean(dim=1)
        else:
            part = probe.reduce(
                RowsRead(
                    weights=weights,
                    members=members,
                    rows=rows,
                    key=edit.keys,
                    value=edit.values,
                    layer=edit.layer,
                    layout=edit.stage.layout,
                    family=edit.family,
                    read=lambda other: self.values(other, edit.state, edit.stage),
                    memory=memory.setdefault(f"{probe.name} memory", {}),
                )
            )
            part = part if part.dim() == 2 else part.transpose(1, 2)
        seen, before, count = memory.get(probe.name, (edit.stage, 0, 0))
        memory[probe.name] = seen, before + part, count + members.sum(dim=1)

    def _hear_states(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.runtime.current
        if state is not None and state.is_prefill:
            hidden = args[0] if args else kwargs["hidden_states"]
            state.memory(self)[name] = state.stages[-1], hidden

    # -- the tower ----------------------------------------------------------------------------------------------------

    def _hear_tower(self, probe: Probe, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        # Packed towers have no batch dimension.
        states = states if states.dim() == 3 else states[None]
        first = int(self.runtime.family.has_cls)
        if probe.signal == "vision_cls_state":
            # A copy per patch, so that it finds its way to the tokens like any other reading.
            states = states[:, :1].expand(-1, states.shape[1] - first, -1)
        else:
            states = states[:, first:]
        self.runtime.readings.setdefault(probe.name, []).append(states)

    def _vision(self, probe: Probe, state: PromptState) -> Tensor:
        memory = state.memory(self)
        if probe.name in memory:
            return memory[probe.name]
        per_image: dict[str, list[Tensor]] = {}
        for vision in state.vision:
            if probe.name not in vision.probes:
                raise PromptError(
                    f"the {vision.modality} was encoded outside the patch, so the vision tower was not read; pass the "
                    "pixels to the patched model instead of encoder outputs"
                )
            per_image[vision.modality] = self.runtime.family.tower_to_tokens(vision.probes[probe.name], vision)
        full = place(state.layout, per_image)
        memory[probe.name] = full[..., 0] if probe.is_scalar else full
        return memory[probe.name]


def transport(values: Tensor, length: int, seen: Tensor | None, wanted: Tensor) -> Tensor:
    """
    Values of one sequence in the coordinates of a shorter one.

    Parameters
    ----------
    values
        ``[B, N1, ...]``.
    length
        Of the prompt as given.
    seen, wanted
        ``[B, N1]`` and ``[B, N2]`` long: the prompt position of every entry of both, -1 for padding; None for the
        prompt as given.

    Returns
    -------
    Tensor
        ``[B, N2, ...]``; padding holds zeros.
    """
    wanted = wanted.to(values.device)
    if seen is not None:
        columns = inverse_index(seen.to(values.device), length)
        wanted = torch.where(wanted < 0, -1, columns.gather(1, wanted.clamp(min=0)))
    rows = torch.arange(values.shape[0], device=values.device)[:, None]
    picked = values[rows, wanted.clamp(min=0)]
    return picked.masked_fill((wanted < 0).view(*wanted.shape, *[1] * (values.dim() - 2)), 0)


def place(layout: Layout, per_image: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """
    Features per image as features per position of a prompt.

    Parameters
    ----------
    layout
        Of the prompt as given.
    per_image
        By modality, one tensor ``[tokens, C]`` per image of the encoder call, as `Family.tower_to_tokens` returns them.

    Returns
    -------
    Tensor
        ``[B, N, C]`` float32; NaN at positions that belong to no image.

    Raises
    ------
    PromptError
        The attention mask hides part of an image.
    """
    values = []
    for span in layout.spans:
        features = per_image[span.modality][span.source]
        if len(features) != len(span):
            raise PromptError(
                f"{span.modality} {span.image} of row {span.sample} has {len(features)} tokens, of which the "
                f"attention mask hides {len(features) - len(span)}; mask whole images or none of their tokens"
            )
        values.append(features.float())
    device = values[0].device if values else layout.segment.device
    width = values[0].shape[-1] if values else 1
    full = torch.full((layout.batch, layout.length, width), float("nan"), device=device)
    if values:
        sample = torch.cat([torch.full((len(span),), span.sample) for span in layout.spans])
        position = torch.cat([span.positions for span in layout.spans])
        full[sample.to(device), position.to(device)] = torch.cat([value.to(device) for value in values])
    return full
