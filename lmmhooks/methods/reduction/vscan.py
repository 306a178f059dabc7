"""
VScan: keep tokens that matter locally (early vision layer) or globally (late one), merge the rest, prune again halfway.

Paper: "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models", TMLR 2026, arXiv
2505.22654. Code: github.com/Tencent/SelfEvolvingAgent, folder VScan (MIT, implemented from its description).
As released, local tokens that do not divide among the windows are lost (``exact_budget`` gives them to the global
scan). Differs from the code in that its second rotary embedding of fused vision attention, a slip, is not repeated, and
that towers of other depth use layers at the same relative depth, and images of other size windows cut at the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, Cut, Newline, TokenGroup
from lmmhooks.methods.reduction.scanning import merge_into_nearest, scan, windows_of
from lmmhooks.methods.reduction.selection import top_ascending
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["VScan"]

#: Relative depth of the early layer: 5, where the features are taken behind layer 22 (CLIP-L).
EARLY = 5 / 22


@dataclass(frozen=True)
class VScan(CropwiseMethod):
    """
    Stage 1 keeps ``keep`` tokens of every crop before the decoder, stage 2 a share ``second`` of them from ``layer``.

    The defaults are the release's: 96 of 576 tokens, 32 of those from layer 16 of 32 on, 64 on average; on Qwen2.5-VL a
    sixth, and a third of it from layer 14 of 28 on. They are no one-stage budgets of 64: compare averages. ``budget``
    moves both stages together. Stage 2 ranks all images of a prompt as one span by attention of the last prompt
    token. Towers without a class token are scored by attention received in layers that see the whole crop, as released.
    """

    id: ClassVar[str] = "vscan"
    paper: ClassVar[str] = "VScan: Rethinking Visual Token Reduction, TMLR 2026, arXiv 2505.22654"
    code: ClassVar[str] = "https://github.com/Tencent/SelfEvolvingAgent"
    cut_settings: ClassVar[tuple[str, ...]] = ("layer",)

    keep: int | float | None = setting(
        1 / 6,
        help="Stage 1: visual tokens kept, a count per image or a share in (0, 1] of every crop. Release: 96 of 576, "
        "0.167 on Qwen2.5-VL; 0.6 there for RefCOCO.",
    )
    newline: Newline = setting(
        "keep_per_row",
        help="Newline and other tokens that show no place in the image: 'keep_per_row' keep all as released, 'drop' "
        "them, or 'per_kept_row' keep those behind a row of which something is left.",
    )
    second: int | float | None = setting(
        1 / 3,
        help="Stage 2: tokens kept, a share in (0, 1] of what stage 1 left or a count per image; None: no stage 2. "
        "Release: 32 of 96, 0.333 on Qwen2.5-VL; 0.67 there for RefCOCO.",
    )
    layer: int | None = setting(
        None, help="Decoder layer before which stage 2 cuts, >= 1. None: half the depth (16 of 32, 14 of 28)."
    )
    window: int | None = setting(
        None, help="Side of a window of the local scan in tokens, >= 1. None: 6, on models with M-RoPE 4, as released."
    )
    early: int | None = setting(
        None,
        help="Vision layer of the local scan, 0-based. None: 5 of CLIP-L, 7 of Qwen2.5-VL, likewise elsewhere.",
    )
    late: int | None = setting(
        None, help="Vision layer of the global scan, 0-based. None: the layer whose output the projector takes."
    )
    exact_budget: bool = setting(
        False, help="Give the global scan what does not divide among the windows, instead of losing it as released."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.second, float) and 0 < self.second <= 1
        count = isinstance(self.second, int) and not isinstance(self.second, bool) and self.second >= 0
        self._require(self.second is None or share or count, "second", "None, a token count >= 0 or a share in (0, 1]")
        self._require(self.layer is None or self.layer >= 1, "layer", ">= 1; stage 1 cuts before the decoder")
        self._require(self.window is None or self.window >= 1, "window", ">= 1")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        # Released for LLaVA (24 x 24 tokens) and Qwen2.5-VL (any grid of merged patches).
        return {"window": 4 if family.mrope else 6}

    @property
    def is_identity(self) -> bool:
        return super().is_identity and (self.budget is not None or self.second in (None, 1.0))

    def _layer(self, family: Any) -> int:
        return round(family.num_layers / 2) if self.layer is None else self.layer

    def cuts(self, family: Any) -> list[Cut]:
        cuts, layer = super().cuts(family), self._layer(family)
        if self.second is not None and layer < family.num_layers:
            cuts.append(Cut(layer, self.second, of_current=True, scope="sample"))
        return cuts

    def shares(self, ratio: float, family: Any) -> dict[int, float]:
        first, *others = self.cuts(family)
        if not others:
            return super().shares(ratio, family)
        # In the published proportion until stage 1 keeps everything; from there on stage 2 alone gives way.
        part = self.second if isinstance(self.second, float) else 1 / 3
        if ratio <= 0.5:
            return {first.layer: 2 * ratio, others[0].layer: 2 * ratio * part}
        return {first.layer: 1.0, others[0].layer: part + (1 - part) * (2 * ratio - 1)}

    def probes(self, family: Any) -> list[Probe]:
        early = round(EARLY * family.feature_layer)
        found = [
            saliency_probe(self, family, self.early, preferred=early, name="early"),
            saliency_probe(self, family, self.late, name="late"),
        ]
        return found + [Probe("decoder_rows", cut.layer, "last", ahead=True) for cut in self.cuts(family)[1:]]

    def select(self, tokens: TokenGroup) -> Tensor:
        early, late, *last = (probe.name for probe in self.probes(tokens.family))
        if tokens.layer:
            return top_ascending(tokens.probes[last[0]], tokens.num_keep)
        exact = self.exact_budget or self.budget is not None
        assert self.window is not None, "filled in by defaults_for"
        windows = windows_of(tokens.row, tokens.col, self.window)
        return scan(tokens.probes[early], tokens.probes[late], windows, tokens.num_keep, exact)

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor | None:
        return None if tokens.layer else merge_into_nearest(tokens.states, index)
