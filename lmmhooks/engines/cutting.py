"""One cut: from a method and a sequence to the positions that stay, with one transfer to the host."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmmhooks.engines.budgeting import image_targets
from lmmhooks.engines.grouping import (
    Group,
    Key,
    assign_quotas,
    find_groups,
    inverse_index,
    remaining_rows,
    same_shape,
    stack_left,
)
from lmmhooks.engines.sequences import gather_last, gather_states
from lmmhooks.errors import MethodError
from lmmhooks.methods.reduction.base import Cut, ReductionMethod, TokenGroup

if TYPE_CHECKING:
    from lmmhooks.engines.probing import Readings
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["Selection", "select_tokens"]


@dataclass(frozen=True, eq=False)
class Selection:
    """
    The outcome of a cut.

    Attributes
    ----------
    host
        Long ``[B, N2]``, CPU: the position each new column holds, -1 for padding.
    index
        The same on the device of the states.
    inverse
        Long ``[B, N]``, there: the new column of every position, -1 for those that left.
    is_padded
        Some row is padded.
    hide
        Nothing leaves: N2 is N, and dropped positions are padding where they stand.
    merged
        New states of kept tokens: row of the batch ``[M]``, new column ``[M]``, state ``[M, D]``.
    """

    host: Tensor
    index: Tensor
    inverse: Tensor
    is_padded: bool
    hide: bool
    merged: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def apply(self, states: Tensor) -> Tensor:
        """States ``[B, N, D]`` of the new sequence, merged ones in place."""
        out = gather_states(states, self.index)
        for sample, column, merged in self.merged:
            out = out.index_put((sample, column), merged.to(out.dtype))
        return out


def select_tokens(
    method: ReductionMethod,
    cut: Cut,
    hidden: Tensor,
    state: PromptState,
    initial: dict[Key, tuple[int, ...]],
    readings: Readings,
) -> Selection | None:
    """
    Ask a method which tokens stay.

    Parameters
    ----------
    method, cut
        What to do.
    hidden
        ``[B, N, D]`` states at the cut.
    state
        The prompt; the cut acts on its last stage.
    initial
        Tokens of every group, per image, at the method's first cut; filled in at that cut.
    readings
        Values of the method's probes.

    Returns
    -------
    Selection or None
        None when everything stays.

    Raises
    ------
    MethodError
        The method chose a token twice, or one that does not exist.
    """
    stage = state.stages[-1]
    layout = stage.layout
    candidates = find_groups(layout, cut.scope or method.scope, method.newline)
    targets = image_targets(method, cut, state, readings.runtime.family)
    split = _each if method.keep_per == "crop" and targets is None else method.split
    first = {} if cut.of_current else initial
    groups = assign_quotas(candidates, cut.keep, method.count, split, first, targets)
    dynamic = cut.keep is None and targets is None
    if not groups or not (dynamic or any(group.quota < len(group) for group in groups)):
        return None
    values = {
        probe.name: readings.values(probe, state, stage).to(hidden.device)
        for probe in method.probes(readings.runtime.family)
        if not probe.signal.startswith("decoder") or probe.layer < cut.layer + probe.ahead
    }
    chosen = [torch.arange(group.quota) for group in groups]
    answers: list[tuple[list[int], Tensor, Tensor | None]] = []
    for ordinals in same_shape(groups):
        group = groups[ordinals[0]]
        if dynamic or 0 < group.quota < len(group):
            tokens = _tokens(method, cut, hidden, state, [groups[i] for i in ordinals], values, readings.runtime)
            index = method.select(tokens)
            answers.append((ordinals, index, method.merge(tokens, index)))
    # The one transfer: what was chosen decides every length from here on.
    if answers:
        flat = torch.cat([index.flatten() for _, index, _ in answers]).cpu()
        parts = flat.split([index.numel() for _, index, _ in answers])
        for (ordinals, index, _), part in zip(answers, parts, strict=True):
            for ordinal, row in zip(ordinals, part.view(index.shape), strict=True):
                chosen[ordinal] = _checked(method, groups[ordinal], row)
    valid = None if stage.mask is None else stage.mask.cpu()
    if dynamic and all(torch.equal(index, torch.arange(len(g))) for g, index in zip(groups, chosen, strict=True)):
        return None
    rows = remaining_rows(layout, valid, groups, chosen, method.newline)
    host = _in_place(rows, layout.length) if cut.hide else stack_left(rows)
    inverse = inverse_index(host, layout.length)
    merged = [
        _merged(groups, ordinals, index.cpu(), states, inverse)
        for ordinals, index, states in answers
        if states is not None
    ]
    device = hidden.device
    is_padded = bool((host < 0).any())
    return Selection(host, host.to(device), inverse.to(device), is_padded, cut.hide, merged)


def _each(keep: int, sizes: Sequence[int]) -> list[int]:
    return [min(keep, size) for size in sizes]


def _tokens(
    method: ReductionMethod,
    cut: Cut,
    hidden: Tensor,
    state: PromptState,
    groups: Sequence[Group],
    values: dict[str, Tensor],
    runtime: Runtime,
) -> TokenGroup:
    sample = torch.tensor([group.sample for group in groups]).to(hidden.device)
    position = torch.stack([group.positions for group in groups]).to(hidden.device)
    first = groups[0]
    stage = state.stages[-1]
    ids = state.input_ids if stage.index is None else gather_last(state.input_ids, stage.index)
    return TokenGroup(
        hidden=hidden,
        sample=sample,
        position=position,
        num_keep=first.quota,
        layer=cut.layer,
        probes={name: value[sample[:, None], position] for name, value in values.items()},
        readings=values,
        crop=first.crop,
        row=first.row,
        col=first.col,
        grid=first.grid,
        family=runtime.family,
        layout=stage.layout,
        input_ids=ids,
        tokenizer=runtime.tokenizer,
        tiling=first.tiling,
        seeds=_streams(state, groups) if method.draws else (),
    )


def _streams(state: PromptState, groups: Sequence[Group]) -> tuple[int, ...]:
    """A number per group that depends on its prompt's tokens and its ordinal, and on nothing else in the batch."""
    ids, valid = state.input_ids.cpu(), state.layout.valid.cpu()
    prompts = {row: ids[row][valid[row]].long().numpy().tobytes() for row in {group.sample for group in groups}}
    streams = []
    for group in groups:
        ordinal = f"{group.key[1]}/{group.key[2]}".encode()
        streams.append(hashlib.blake2b(prompts[group.sample], key=ordinal, digest_size=8).digest())
    return tuple(int.from_bytes(stream, "little") for stream in streams)


def _checked(method: ReductionMethod, group: Group, row: Tensor) -> Tensor:
    row = row[row >= 0]
    if len(row) and (int(row.max()) >= len(group) or len(row.unique()) != len(row)):
        raise MethodError(
            f"{method.id}: select() chose a token twice or beyond the {len(group)} of its group; indices must be "
            "unique and below that number, with -1 for fillers"
        )
    return row


def _in_place(rows: Sequence[Tensor], length: int) -> Tensor:
    index = torch.full((len(rows), length), -1)
    for sample, row in enumerate(rows):
        index[sample, row] = row
    return index


def _merged(
    groups: Sequence[Group], ordinals: Sequence[int], index: Tensor, states: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged states ``[G, K, D]`` with the place of each in the new sequence, fillers left out."""
    device = states.device
    real = index >= 0
    sample = torch.tensor([groups[ordinal].sample for ordinal in ordinals])[:, None].expand_as(index)
    positions = torch.stack([groups[ordinal].positions for ordinal in ordinals]).gather(1, index.clamp(min=0))
    column = inverse[sample, positions]
    return sample[real].to(device), column[real].to(device), states[real.to(device)]
