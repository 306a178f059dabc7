"""
Forwards of beam search that read several possible next tokens of every beam at once.

Candidates stand side by side behind the beam they continue: at one position, each seeing the beam and itself. So the
keys and values of a beam are read once for all its candidates, those of the chosen ones are already there, and the
forward of the next step is not another one. To every other engine this is a continuation by several tokens.

Rows of a batch may hold answers of different lengths, once the search of one sample went back: then everything behind
the prompt is read again, shorter rows padded on the left, and columns line up again from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import base_name
from lmmhooks.engines.limits import refuse_layers
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.errors import ModelError, PromptError

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit
    from lmmhooks.engines.runtime import Runtime

__all__ = ["Lookahead", "Siblings", "Sight"]


@dataclass(frozen=True, eq=False)
class Sight:
    """
    What the newest tokens of every row attend to in the last decoder layer, the largest weight of any head.

    Attributes
    ----------
    attention
        ``[R, K, g + 1]`` float32: the g columns behind the prompt, then the token itself; rows sum to 1 over the whole
        sequence.
    image
        ``[R, K]``: mass on visual tokens.
    """

    attention: Tensor
    image: Tensor


class Siblings:
    """
    Hooks the decoder: candidates of one beam must not see each other, and the last layer's attention is read.

    Attributes
    ----------
    probe
        For the attention engine.
    """

    def __init__(self, runtime: Runtime, name: str) -> None:
        family = runtime.family
        refuse_layers(family, "search of candidates")
        backend = base_name(family.text_config)
        if backend not in ("sdpa", "eager"):
            raise ModelError(
                f"{name} reads several next tokens side by side, which needs a mask that attention backend "
                f"{backend!r} does not take; load the model with attn_implementation='sdpa'"
            )
        self.runtime = runtime
        self.probe = DecoderProbe(family.num_layers - 1, "last", hears=self._hear, on_decode=True)
        self.apart = 0
        """How many tokens of the coming forward are alternatives to each other; 0: they follow each other."""
        self.sight: Sight | None = None
        self._masks: list[tuple[Tensor, Tensor]] = []

    def attach(self, attachments: Attachments) -> None:
        """Hook every decoder layer; must come after whatever hands layers masks of their own."""
        for layer, module in enumerate(self.runtime.family.layers):
            attachments.pre_hook(module, self._part, f"mask of decoder layer {layer} (candidates)")

    def begin(self, apart: int) -> None:
        """A forward begins."""
        self.apart = apart
        self.sight = None
        self._masks.clear()

    def _part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.apart < 2 or self.runtime.current is None:
            return None
        mask = kwargs.get("attention_mask")
        # Layers that see the same sequence share a mask.
        for given, parted in self._masks:
            if given is mask:
                return args, {**kwargs, "attention_mask": parted}
        # Several new tokens behind a cache always get one; `Siblings` has refused backends whose masks are not dense.
        assert isinstance(mask, Tensor)
        own = torch.eye(self.apart, dtype=torch.bool, device=mask.device)
        hidden = nn.functional.pad(~own, (mask.shape[-1] - self.apart, 0))
        parted = mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
        self._masks.append((mask, parted))
        return args, {**kwargs, "attention_mask": parted}

    def _hear(self, weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
        if edit.state.is_prefill:
            return
        peak = weights.amax(dim=1)  # (rows, new tokens, sequence)
        num_new = peak.shape[1]
        peak = peak / peak.sum(dim=-1, keepdim=True)
        image = (peak @ edit.stage.layout.visual.to(peak)[..., None])[..., 0]
        generated = peak[..., peak.shape[-1] - edit.state.grown :]
        if self.apart:
            # Siblings have weight 0 for each other.
            before, new = generated.split([edit.state.grown - num_new, num_new], dim=-1)
            generated = torch.cat([before, new.diagonal(dim1=1, dim2=2)[..., None]], dim=-1)
        else:
            generated, image = generated[:, -1:], image[:, -1:]
        self.sight = Sight(generated, image)


class Lookahead:
    """
    The rows of one ``generate`` call behind their prompt.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    siblings
        Attached to it.
    arguments
        Keyword arguments of the forward that read the prompt, as ``generate`` keeps them.
    cache
        What that forward filled.

    Raises
    ------
    PromptError
        A cache that cannot be taken back, or a prompt the patch has not read.
    """

    def __init__(self, runtime: Runtime, siblings: Siblings, arguments: dict[str, Any], cache: Any) -> None:
        self.runtime = runtime
        self.model = runtime.family.model
        self.siblings = siblings
        self.cache = cache
        state = runtime.state_of(cache)
        if not isinstance(cache, DynamicCache) or cache.offloading or state is None or state.next_position is None:
            kind = type(cache).__name__ if cache is not None else "nothing"
            raise PromptError(
                f"candidates of beam search are taken back from the cache, which {kind} does not allow; leave "
                "cache_implementation, past_key_values and use_cache out, so that the default dynamic cache is used"
            )
        self.state = state
        self.first = state.next_position
        """``[R]`` position of the first token of the answer."""
        self.columns = 0
        """Columns behind the prompt, candidates not counted."""
        self.waiting = 0
        """Candidates at the end of the cache."""
        self._arguments = arguments
        mask = arguments.get("attention_mask")
        self._mask: Tensor | None = mask if isinstance(mask, Tensor) else None
        """``[R, N + columns]``; None when nothing is padded."""

    def look(self, candidates: Tensor, lengths: Tensor) -> tuple[Tensor, Sight]:
        """
        Read ``candidates [R, K]`` behind rows whose answers have ``lengths [R]`` tokens.

        Returns
        -------
        logits
            ``[R, K, vocabulary]`` float32 after each of them.
        sight
            What each attends to.
        """
        number = candidates.shape[1]
        steps = lengths[:, None].expand(-1, number)
        return self._forward(candidates, steps, apart=number, keep=0)

    def keep(self, parents: Tensor, ordinals: Tensor) -> None:
        """Go on with rows ``parents [R]``, each with candidate number ``ordinals [R]`` behind it."""
        self._select(parents)
        for layer in self.cache.layers:
            last = layer.keys.shape[2] - self.waiting
            rows = torch.arange(len(parents), device=layer.keys.device)
            for name in ("keys", "values"):
                # Selecting rows has made a copy, which may be written to.
                held = getattr(layer, name)
                held[:, :, last] = held[rows, :, last + ordinals.to(held.device)]
                setattr(layer, name, held[:, :, : last + 1])
        self._grow(1, None)
        self.waiting = 0

    def read(self, parents: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Sight]:
        """
        Forget the candidates, go on with rows ``parents [R]`` and read ``tokens [R]`` behind them.

        Returns
        -------
        As `look`, with K = 1.
        """
        self._crop(self.waiting)
        self.waiting = 0
        self._select(parents)
        out = self._forward(tokens[:, None], lengths[:, None], apart=0, keep=1)
        self.waiting = 0
        self._grow(1, None)
        return out

    def read_again(self, answers: Sequence[Tensor]) -> tuple[Tensor, Sight]:
        """
        Read whole answers behind the prompt, in place of what is there.

        Parameters
        ----------
        answers
            Per row ``[n_r]``, 1 token or more.

        Returns
        -------
        As `look`, with K = 1: the last token of each.
        """
        self._crop(self.columns + self.waiting)
        if self._mask is not None:
            self._mask = self._mask[:, : self._mask.shape[1] - self.columns]
        self.columns = self.waiting = 0
        longest = max(map(len, answers))
        pads = torch.tensor([longest - len(answer) for answer in answers], device=self.first.device)
        tokens = torch.stack([nn.functional.pad(answer, (longest - len(answer), 0)) for answer in answers])
        counted = torch.arange(longest, device=self.first.device) - pads[:, None]
        valid = counted >= 0 if len(set(map(len, answers))) > 1 else None
        out = self._forward(tokens, counted.clamp(min=0), apart=0, keep=1, valid=valid)
        self.waiting = 0
        self._grow(longest, valid)
        return out

    def _forward(
        self, tokens: Tensor, steps: Tensor, apart: int, keep: int, valid: Tensor | None = None
    ) -> tuple[Tensor, Sight]:
        number = tokens.shape[1]
        arguments = {k: v for k, v in self._arguments.items() if k not in ("mm_token_type_ids", "token_type_ids")}
        types = self._arguments.get("token_type_ids")
        if types is not None:
            arguments["token_type_ids"] = types[:, -1:].expand(-1, number)
        given = self._arguments["position_ids"]
        after = given[..., -1:] + 1
        mask = self._mask_with(number, valid)
        inputs = self.model.prepare_inputs_for_generation(
            tokens,
            **{
                **arguments,
                "past_key_values": self.cache,
                "attention_mask": mask,
                "position_ids": after + steps.to(after.device),
                "use_cache": True,
                "logits_to_keep": keep,
            },
            is_first_iteration=False,
        )
        # Not as ids: a candidate may be one that stands for visual features, and nobody means it to.
        inputs["inputs_embeds"] = self.model.get_input_embeddings()(inputs.pop("input_ids"))
        self.siblings.begin(apart)
        # Other engines count positions by columns, of which candidates share one and padding takes some.
        self.state.next_position = self.first + steps[:, -1].to(self.first.device) + 1 - (self.columns + number)
        self.state.coming = valid
        try:
            logits = self.model(**inputs, return_dict=True).logits.float()
        finally:
            self.siblings.apart = 0
        assert self.siblings.sight is not None
        self.waiting = number
        return logits, self.siblings.sight

    def _mask_with(self, number: int, valid: Tensor | None) -> Tensor | None:
        if self._mask is None:
            if valid is None:
                return None
            shape = (len(self.first), self.state.layout.length)
            self._mask = torch.ones(shape, dtype=torch.long, device=self.first.device)
        new = self._mask.new_ones(len(self._mask), number) if valid is None else valid.to(self._mask)
        return torch.cat([self._mask, new], dim=1)

    def _grow(self, number: int, valid: Tensor | None) -> None:
        """As many columns behind the prompt are there to stay."""
        self._mask = self._mask_with(number, valid)
        self.columns += number

    def _crop(self, number: int) -> None:
        if number:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :-number], layer.values[:, :, :-number]

    def _select(self, parents: Tensor) -> None:
        # Beams change places within a sample only, whose rows share mask and positions.
        self.runtime.reorder_cache(self.cache, parents)
