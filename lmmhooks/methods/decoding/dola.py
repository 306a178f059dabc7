"""
DoLa: subtract what an early layer would say, because facts enter late and fluent filler early.

At every step and for every row, the early layer whose distribution differs most from the last layer's is chosen from
a bucket, and its log-probabilities are subtracted from the last layer's on plausible tokens. The head reads early
states without the final norm, as released. A method for text models and a standard baseline of papers on images; it
acts on prompts without images too. No extra forward: all early states of a step go through the head in one product.

Differs from the released code: each row of a batch chooses its layer by itself (the release takes the mean over the
batch). The weights sum to 0, so a temperature has no usual meaning, and where last and early layer agree all plausible
tokens score the same; the authors' scripts run with ``repetition_penalty=1.2`` (UNVERIFIED per task).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import Method, setting
from lmmhooks.methods.decoding.base import DecodingMethod, contrast, cut
from lmmhooks.methods.decoding.early import chosen, early_layers, mixture_divergence, within
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Dola"]


@dataclass(frozen=True)
class Dola(DecodingMethod):
    """Decoding by contrasting layers (see the module docstring)."""

    id: ClassVar[str] = "dola"
    paper: ClassVar[str] = (
        "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models, ICLR 2024, arXiv 2309.03883"
    )
    code: ClassVar[str] = "https://github.com/voidism/DoLa"
    lazy_allowed: ClassVar[bool] = False

    layers: str | tuple[int, ...] = setting(
        "low",
        help="Early layers to choose from, as inputs of decoder layers (0: the embedding); one: always that. 'low' or "
        "'high': every second layer of that half, without the first two where embeddings are tied (paper). Papers on "
        "images rarely state theirs: 'low' is UNVERIFIED for them; transformers suggests 'high' for short answers.",
    )
    beta: float = setting(
        0.1,
        help="Plausibility cut in [0, 1], 'relative_top' of the release (0.1); 0: no cut, raw logits are subtracted.",
    )
    normed: bool = setting(False, help="Pass early states through the final norm first. The release does not.")
    lazy: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        else:
            self._require(self.layers in ("low", "high"), "layers", "'low', 'high' or a list of layers")

    def check(self, family: Any) -> None:
        if not isinstance(self.layers, str):
            self._require(within(self.layers, family), "layers", f"in 0 ... {family.num_layers}, at least one")

    def bind(self, family: Any) -> Method:
        return replace(self, layers=early_layers(self.layers, family)) if isinstance(self.layers, str) else self

    def reads(self, family: Any) -> Sequence[int]:
        assert not isinstance(self.layers, str), "filled in by bind"
        return self.layers

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        layers = self.reads(view.family)
        early = view.early_logits(layers, self.normed).to(main.device)
        premature = early[0]
        if len(layers) > 1:
            premature = chosen(early, mixture_divergence(main, early).argmax(dim=0))
        keep = self.keep(main)
        if keep is not None:
            main, premature = main.log_softmax(dim=-1), premature.log_softmax(dim=-1)
        return contrast([main, premature], [1.0, -1.0], cut(keep, view))
