"""
CDPruner: keep tokens that differ from each other and matter to the question.

A determinantal point process over the tokens of a crop, its kernel the cosine similarity of the tokens times the
relevance of both to the instruction; the subset of large determinant is built greedily.

Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025,
arXiv 2506.10967. Code: github.com/Theia-4869/CDPruner (Apache-2.0). As released and against the paper's text, relevance
is minus the CLIP similarity of patch and question: penultimate CLIP features match a text the wrong way round. Differs
from the release in that every prompt has its own question, where texts of a batch are mixed, and in guards against
constant relevance and spent rank. The authors' variant for models without a CLIP text tower was never released: that of
OpenVINO GenAI, which compares word embeddings, stands in (its fidelity is UNVERIFIED).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.clip_relevance import ClipMatcher, check_clip_folder
from lmmhooks.methods.reduction.greedy import cosine, spanning
from lmmhooks.methods.reduction.questions import asked, question_texts

__all__ = ["CDPruner", "scaled"]


@dataclass(frozen=True)
class CDPruner(CropwiseMethod):
    """
    Greedy determinantal choice in every crop, in raster order, before the decoder.

    With ``clip``, relevance comes from the text tower of the model's own CLIP checkpoint, as published for LLaVA;
    without, from cosines of visual tokens and the mean word embedding of the instruction. Either is scaled to
    (0, 1] over all crops of a prompt. Published ``keep`` on LLaVA-1.5: 128, 64, 32; the same per crop on LLaVA-NeXT.
    """

    id: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "Beyond Attention or Similarity (CDPruner), NeurIPS 2025, arXiv 2506.10967"
    code: ClassVar[str] = "https://github.com/Theia-4869/CDPruner"

    relevance: Literal["auto", "clip", "embeddings"] = setting(
        "auto",
        help="'clip': the released recipe for LLaVA, needs clip and the processor given to wrap; 'embeddings': word "
        "embeddings of the decoder (UNVERIFIED); 'auto': 'clip' if clip is given.",
    )
    clip: str | None = setting(
        None,
        help="Local folder of the CLIP checkpoint that the vision tower comes from (LLaVA: clip-vit-large-patch14-336) "
        "with its text tower and tokenizer.",
    )
    theta: float | None = setting(
        None,
        help="Weight of relevance against diversity, in [0, 1): relevance r enters as exp(theta / (2 (1 - theta)) r); "
        "0 leaves diversity alone. None: r itself with 'clip', as released, and 0.5 with 'embeddings' (UNVERIFIED).",
    )
    sign: Literal[-1, 1] | None = setting(
        None, help="Of the similarity to the text. None: -1 with 'clip', as released; 1 with 'embeddings'."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.relevance in ("auto", "clip", "embeddings"), "relevance", "'auto', 'clip' or 'embeddings'")
        self._require(self.relevance != "clip" or self.clip is not None, "relevance", "another without clip='FOLDER'")
        self._require(self.relevance != "embeddings" or self.clip is None, "clip", "None with relevance='embeddings'")
        self._require(self.theta is None or 0 <= self.theta < 1, "theta", "in [0, 1) or None")
        self._require(self.sign in (None, -1, 1), "sign", "-1, 1 or None")

    def check(self, family: Any) -> None:
        super().check(family)
        if self.clip is None:
            return
        if not (family.has_cls and family.projects_patches):
            raise MethodError(
                f"{self.id}: clip needs a CLIP tower whose patches are projected one by one, which {family.name} has "
                "not; leave clip out to rank by word embeddings"
            )
        check_clip_folder(self.id, self.clip, family.vision.config.hidden_size)

    def probes(self, family: Any) -> list[Probe]:
        return [] if self.clip is None else [Probe("vision_states", family.feature_layer)]

    def select(self, tokens: TokenGroup) -> Tensor:
        similarity = self._to_words(tokens) if self.clip is None else self._to_text(tokens, self.clip)
        sign = (-1 if self.clip else 1) if self.sign is None else self.sign
        relevance = scaled(sign * similarity, _candidates(tokens).to(similarity.device))
        theta = 0.5 if self.theta is None and self.clip is None else self.theta
        if theta is not None:
            relevance = torch.exp(theta / (2 * (1 - theta)) * relevance)
        weight = relevance[tokens.sample[:, None], tokens.position]
        kernel = weight[:, :, None] * cosine(tokens.states) * weight[:, None]
        return spanning(kernel, tokens.num_keep).sort(dim=1).values

    def _to_text(self, tokens: TokenGroup, folder: str) -> Tensor:
        """``[B, N]``: similarity of patches to the question of their row, NaN elsewhere."""
        (patches,) = tokens.readings.values()
        texts = question_texts(self, tokens)
        if patches.device not in self._loaded:
            self._loaded[patches.device] = ClipMatcher(folder, patches.device)
        return self._loaded[patches.device].similarity(patches, texts)

    def _to_words(self, tokens: TokenGroup) -> Tensor:
        """``[B, N]``: similarity of all tokens to the mean word embedding of the instruction of their row."""
        hidden = tokens.hidden.detach().float()
        words = asked(tokens).to(hidden.device, hidden.dtype)
        # A sum serves as well as a mean: cosines know no length.
        return cosine(words[:, None] @ hidden, hidden)[:, 0]

    @cached_property
    def _loaded(self) -> dict[torch.device, ClipMatcher]:
        """Read from disk on first use, and kept with the method."""
        return {}


def _candidates(tokens: TokenGroup) -> Tensor:
    """``[B, N]`` bool, CPU: visual tokens that show a place, of all crops of a prompt."""
    found = torch.zeros(tokens.layout.batch, tokens.layout.length, dtype=torch.bool)
    for span in tokens.layout.spans:
        found[span.sample, span.positions] = span.tokens.crop >= 0 if span.tokens.grids else True
    return found


@torch.no_grad()
def scaled(relevance: Tensor, candidates: Tensor) -> Tensor:
    """
    Relevance ``[B, N]`` scaled per row, so that the least relevant candidate has almost none and the most relevant 1.

    Rows whose candidates are all as relevant are 1 throughout: diversity alone decides.
    """
    low = torch.where(candidates, relevance, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(candidates, relevance, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1.0)
