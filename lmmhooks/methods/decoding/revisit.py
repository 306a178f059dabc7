"""
ReVisiT: let the visual token that agrees most with the prediction vote on the next word.

The states of the prompt's visual tokens are read through the model's own head. At every step the one whose
distribution over the plausible tokens is closest to the prediction is chosen, and the two distributions are multiplied.
There is no strength: both count once.

The release keeps the logits of all visual tokens, gigabytes for several layers; here their states are kept, and the
head is asked for the rows of plausible tokens alone, which is the same because nothing else enters a softmax. Differs
from the released code otherwise: every row has its own plausible tokens, and rows without an image stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import Method, setting
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.methods.decoding.early import BUCKETS, early_layers, mixture_divergence, within
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Revisit", "picked", "restricted"]

#: Layers of the authors' scripts.
PUBLISHED: Mapping[str, str] = {"llava": "last", "qwen2_5_vl": "all"}

BLOCK = 2**24
"""Logits of visual tokens that are held at once; bounds memory for many tokens and many plausible words."""


def restricted(logits: Tensor, keep: Tensor | None) -> Tensor:
    """Log-probabilities over the tokens that ``keep`` holds, -inf for others; both ``[B, vocabulary]``."""
    return (logits if keep is None else logits.masked_fill(~keep, -torch.inf)).log_softmax(dim=-1)


def picked(states: Sequence[Tensor], index: Tensor) -> Tensor:
    """
    The candidate that every row chose, without a copy of all of them.

    Parameters
    ----------
    states
        Per layer ``[B, V, D]``, each with at least one token.
    index
        Long ``[B]``, counted through the layers.

    Returns
    -------
    Tensor
        ``[B, D]``.
    """
    chosen, start = states[0][:, 0].to(index.device), 0
    for layer in states:
        size = layer.shape[1]
        place = (index - start).clamp(0, size - 1).to(layer.device)
        here = layer.gather(1, place[:, None, None].expand(-1, 1, layer.shape[-1]))[:, 0].to(index.device)
        chosen = torch.where((index >= start)[:, None], here, chosen)
        start += size
    return chosen


@dataclass(frozen=True)
class Revisit(DecodingMethod):
    """Guidance by the closest visual token (see the module docstring)."""

    id: ClassVar[str] = "revisit"
    paper: ClassVar[str] = (
        "Revisit What You See: Disclose Language Prior in Vision Tokens for Efficient Guided Decoding of LVLMs, 2025, "
        "arXiv 2506.09522"
    )
    code: ClassVar[str] = "https://github.com/bscho333/ReVisiT"
    lazy_allowed: ClassVar[bool] = False

    beta: float = setting(
        1e-5, help="Plausibility cut in [0, 1], relative to the largest probability (release: 1e-5); 0: no cut."
    )
    layers: str | tuple[int, ...] | None = setting(
        None,
        help="Layers whose visual tokens are candidates, as inputs of decoder layers; the number of layers: the normed "
        "output. 'last': that alone; 'all': every second one from 0 (from 2 where embeddings are tied); 'low', 'high': "
        "of that half (UNVERIFIED). None: as published, 'all' for Qwen2.5-VL, 'last' for LLaVA-1.5 and for others.",
    )
    lazy: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str):
            self._require(self.layers in BUCKETS, "layers", f"{', '.join(map(repr, BUCKETS))} or a list of layers")
        elif self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        return {"layers": PUBLISHED[family.name]} if family.name in PUBLISHED else {}

    def check(self, family: Any) -> None:
        if isinstance(self.layers, tuple):
            self._require(within(self.layers, family), "layers", f"in 0 ... {family.num_layers}, at least one")

    def bind(self, family: Any) -> Method:
        if isinstance(self.layers, tuple):
            return self
        return replace(self, layers=early_layers(self.layers or "last", family))

    def reads_image(self, family: Any) -> Sequence[int]:
        assert isinstance(self.layers, tuple), "filled in by bind"
        return self.layers

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        # Layer by layer, token by token: the first of equally close candidates is chosen.
        layers = [layer for layer in self.reads_image(view.family) if view.visual[layer].shape[1]]
        if not layers:
            return main
        said, keep, tokens = main, self.keep(main), None
        if keep is not None:
            # Plausible in any row: the one number that the host has to know.
            tokens = keep.any(dim=0).nonzero().flatten()
            said, keep = main[:, tokens], keep[:, tokens]
        shown = [view.visual[layer] for layer in layers]
        real = torch.cat([view.is_visual[layer].to(main.device) for layer in layers], dim=1)
        distance = torch.cat([self._distance(said, keep, states, tokens, view.family) for states in shown], dim=1)
        closest = distance.masked_fill(~real, torch.inf).argmin(dim=1)
        guide = view.family.token_logits(picked(shown, closest), tokens).to(main.device)
        scores = restricted(said, keep) + restricted(guide, keep)
        if tokens is not None:
            scores = torch.full_like(main, -torch.inf).index_copy(1, tokens, scores)
        return torch.where(real.any(dim=1, keepdim=True), scores, main)

    def _distance(
        self, said: Tensor, keep: Tensor | None, states: Tensor, tokens: Tensor | None, family: Any
    ) -> Tensor:
        """``[B, V]`` from the prediction, of the visual tokens of one layer."""
        kept = None if keep is None else keep[:, None]
        blocks = states.split(max(1, BLOCK // said.numel()), dim=1)
        logits = (family.token_logits(block, tokens).to(said.device) for block in blocks)
        return torch.cat([mixture_divergence(said[:, None], block, kept) for block in logits], dim=1)
