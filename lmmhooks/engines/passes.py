"""Forwards of the unpatched decoder over a prompt that is about to be read: what some methods must know beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.branch_rows import left_pad
from lmmhooks.engines.rows import take_rows
from lmmhooks.errors import PromptError
from lmmhooks.layout import Layout

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["PlainPasses", "beside"]

Listener = Callable[[AttentionCall], AttentionResult]


class _Enough(Exception):
    """Raised past the last layer a pass is run for."""


class PlainPasses:
    """
    Implements `lmmhooks.methods.prompt.Passes` for one prompt.

    Parameters
    ----------
    runtime
        Of the wrapped model; its methods do nothing during a pass.
    state
        The prompt; its layout is known.
    arguments
        What the decoder is about to be called with, visual features already among the embeddings.
    """

    def __init__(self, runtime: Runtime, state: PromptState, arguments: Mapping[str, Any]) -> None:
        self.runtime = runtime
        self.state = state
        self.layout: Layout = state.layout
        self.arguments = dict(arguments)
        self._read: dict[bool, tuple[Tensor, Tensor]] = {}

    # -- what methods ask for -----------------------------------------------------------------------------------------

    def last_hidden(self, image: bool) -> Tensor:
        return self._reading(image)[0]

    def first_logits(self, image: bool = True) -> Tensor:
        family = self.runtime.family
        return family.lm_head(beside(self._reading(image)[1], family.lm_head)).float()

    def head_outputs(self, layers: Sequence[int], image: bool) -> dict[int, Tensor]:
        last = self.last_positions(image)
        found: dict[int, Tensor] = {}

        def listen(layer: int) -> Listener:
            def listener(call: AttentionCall) -> AttentionResult:
                output, weights = call.run_base()
                found[layer] = take_rows(output.transpose(1, 2), last.to(output.device))[:, :, 0]
                return output, weights

            return listener

        self.run(image, {layer: listen(layer) for layer in layers}, through=max(layers))
        return found

    # -- for engines --------------------------------------------------------------------------------------------------

    def last_positions(self, image: bool) -> Tensor:
        """``[B, 1]`` column of the last position of every row."""
        if image:
            return self.layout.last.int().argmax(dim=1, keepdim=True)
        embeddings = self.text_only["inputs_embeds"]
        return torch.full((embeddings.shape[0], 1), embeddings.shape[1] - 1, device=embeddings.device)

    @cached_property
    def text_only(self) -> dict[str, Any]:
        """
        Arguments of the decoder for the prompt without its images.

        Visual tokens and the tokens that open and close an image are left out, rows are padded on the left, positions
        count the text that is left.
        """
        family = self.runtime.family
        marks = torch.tensor(family.visual_ids, device=self.state.input_ids.device)
        keep = self.layout.valid & ~torch.isin(self.state.input_ids, marks).to(self.layout.valid.device)
        embeddings = self.arguments["inputs_embeds"]
        keep = keep.to(embeddings.device)
        rows = [row[kept] for row, kept in zip(embeddings, keep, strict=True)]
        if not all(len(row) for row in rows):
            raise PromptError("nothing is left of a prompt without its image; the prompt needs text beside its images")
        length = max(len(row) for row in rows)
        # Embeddings are padded like tokens: along the first dimension, on the left.
        joined = torch.stack([torch.nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        mask = left_pad([torch.ones(len(row), dtype=torch.long, device=embeddings.device) for row in rows], length)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        given = self.arguments.get("position_ids")
        if given is not None and given.dim() == 3:
            # Text advances all axes of a multi-axis position alike.
            positions = positions.expand(given.shape[0], -1, -1)
        return {
            "inputs_embeds": joined,
            "attention_mask": None if bool(mask.all()) else mask,
            "position_ids": positions,
            "use_cache": False,
        }

    def run(
        self,
        image: bool,
        listeners: Mapping[int, Listener] | None = None,
        inputs: Mapping[int, Callable[[Tensor, dict[str, Any]], None]] | None = None,
        through: int | None = None,
    ) -> Any:
        """
        One forward of the unpatched decoder.

        Parameters
        ----------
        image
            Whether visual tokens are there.
        listeners
            Decoder layer to a function that answers its attention call; the layer's attention must carry a port.
        inputs
            Decoder layer to a function that is shown its input ``[B, N, D]`` and its other arguments.
        through
            Last layer to run; None for all of them and the final norm.

        Returns
        -------
        The decoder's output, or None for a pass that ends early.
        """
        family = self.runtime.family
        arguments = self._with_image() if image else self.text_only
        handles = []
        try:
            for layer, show in (inputs or {}).items():
                handles.append(family.layers[layer].register_forward_pre_hook(_shown(show), with_kwargs=True))
            if through is not None:
                handles.append(family.layers[through].register_forward_hook(_stop))
            with self.runtime.silent(listeners or {}), torch.no_grad():
                return family.text_model(**arguments)
        except _Enough:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _with_image(self) -> dict[str, Any]:
        mask = self.arguments.get("attention_mask")
        if mask is not None and (isinstance(mask, dict) or mask.dim() != 2):
            # Shaped for a cache of fixed length, which a pass without cache has not got.
            padding = self.state.stages[0].mask
            mask = None if padding is None else padding.long()
        return {**self.arguments, "attention_mask": mask, "past_key_values": None, "use_cache": False}

    def _reading(self, image: bool) -> tuple[Tensor, Tensor]:
        """Layer outputs ``[L, B, D]`` and normed output ``[B, D]`` at the last positions."""
        if image not in self._read:
            last = self.last_positions(image)
            num_layers = self.runtime.family.num_layers
            found: dict[int, Tensor] = {}

            def show(layer: int) -> Callable[..., None]:
                def keep(hidden: Tensor, arguments: dict[str, Any]) -> None:
                    found[layer] = hidden.gather(1, last.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))

                return keep

            # The output of a layer is what the next one is given; of the last one, what the final norm is given.
            handle = self.runtime.family.norm.register_forward_pre_hook(_shown(show(num_layers)), with_kwargs=True)
            try:
                output = self.run(image, inputs={layer: show(layer) for layer in range(1, num_layers)})
            finally:
                handle.remove()
            device = output.last_hidden_state.device
            hidden = torch.stack([found[layer][:, 0].to(device) for layer in range(1, num_layers + 1)])
            index = last.to(device)[..., None].expand(-1, -1, hidden.shape[-1])
            self._read[image] = hidden, output.last_hidden_state.gather(1, index)[:, 0]
        return self._read[image]


def beside(states: Tensor, module: nn.Module) -> Tensor:
    """States on the device of a module's weights; where accelerate loads those on demand, it moves inputs itself."""
    device = next(module.parameters()).device
    return states if device.type == "meta" else states.to(device)


def _shown(show: Callable[[Tensor, dict[str, Any]], None]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        show(args[0] if args else kwargs["hidden_states"], rest)

    return hook


def _stop(module: Any, args: Any, output: Any) -> None:
    raise _Enough
