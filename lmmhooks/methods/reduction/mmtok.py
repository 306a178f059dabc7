"""
MMTok: keep tokens that cover the words of the question and the image at once.

Greedy maximum coverage: rows are words and patches, a token covers each by a softmax over similarities, and every step
takes the token that raises the best coverage of all rows most.

Paper: "Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv 2508.18264. Code:
github.com/Ironieser/MMTok (Apache-2.0). Differs from the released code in the list of words left out, which is ours
(`lmmhooks.methods.words`), in batches, and in that patches of padded borders always compete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, Scope, TokenGroup
from lmmhooks.methods.reduction.greedy import cosine, cover
from lmmhooks.methods.reduction.merging import feature_probes, features
from lmmhooks.methods.reduction.questions import asked, question_texts
from lmmhooks.methods.words import listed_words

__all__ = ["MMTok", "coverage_rows"]


@dataclass(frozen=True)
class MMTok(CropwiseMethod):
    """
    Tokens of every crop that cover question and image, in raster order, before the decoder.

    Words are compared with tokens as the decoder takes them, by its own word embeddings; patches with each other as the
    projector takes them, or as merged tokens where it does not take single patches. A question of function words alone
    counts whole; without any text, the image alone is covered. Published ``keep``: 192, 128, 64 on LLaVA-1.5, 0.1 on
    Qwen2.5-VL.
    """

    id: ClassVar[str] = "mmtok"
    paper: ClassVar[str] = "Multimodal Coverage Maximization for Efficient Inference of VLMs, arXiv 2508.18264"
    code: ClassVar[str] = "https://github.com/Ironieser/MMTok"

    words: Literal["content", "question", "tokens"] | None = setting(
        None,
        help="'content': words of the question that are no function words, as released for LLaVA; 'question': all of "
        "it behind the literal 'Question: ', as released for Qwen; both need the processor given to wrap. 'tokens': "
        "the instruction's tokens as they stand in the prompt. None: as released for the model.",
    )
    alpha: float = setting(0.5, help="Weight of covering the image against covering the words, >= 0.")
    text_temperature: float = setting(0.02, help="Of the softmax of a word over tokens, > 0 (released: 0.02).")
    visual_temperature: float = setting(0.2, help="Of the softmax of a patch over tokens, > 0 (released: 0.2).")
    per_crop: bool = setting(
        True, help="Cover every crop on its own; False: all crops of an image together (which is released, UNVERIFIED)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = (None, "content", "question", "tokens")
        self._require(self.words in allowed, "words", "'content', 'question', 'tokens' or None")
        self._require(self.alpha >= 0, "alpha", ">= 0")
        self._require(self.text_temperature > 0, "text_temperature", "> 0")
        self._require(self.visual_temperature > 0, "visual_temperature", "> 0")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        return {"words": "question" if family.mrope else "content"}

    @property
    def scope(self) -> Scope:
        return "crop" if self.per_crop else "image"

    def probes(self, family: Any) -> list[Probe]:
        return feature_probes(family)

    def select(self, tokens: TokenGroup) -> Tensor:
        words, counts = self._embedded_words(tokens)
        rows = coverage_rows(
            cosine(words[tokens.sample], tokens.states),
            counts[tokens.sample],
            cosine(features(tokens)),
            self.alpha,
            self.text_temperature,
            self.visual_temperature,
        )
        return cover(rows, tokens.num_keep).sort(dim=1).values

    def _embedded_words(self, tokens: TokenGroup) -> tuple[Tensor, Tensor]:
        """Word embeddings ``[B, M, D]``, zeros filling up shorter rows, and how many each row has, ``[B]``."""
        hidden = tokens.hidden.detach()
        if self.words == "tokens":
            lists = [states[mask] for states, mask in zip(hidden, asked(tokens).to(hidden.device), strict=True)]
        else:
            embed = tokens.family.model.get_input_embeddings()
            texts = [self._wanted(text) for text in question_texts(self, tokens)]
            ids = [tokens.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
            lists = [embed(torch.tensor(row, dtype=torch.long, device=hidden.device)).detach() for row in ids]
        counts = torch.tensor([len(row) for row in lists]).to(hidden.device)
        return pad_sequence(lists, batch_first=True), counts

    def _wanted(self, text: str) -> str:
        if self.words == "question":
            return f"Question: {text}"
        return " ".join(text[start:stop] for start, stop in listed_words(text)) or text


@torch.no_grad()
def coverage_rows(
    to_words: Tensor,
    counts: Tensor,
    to_patches: Tensor,
    alpha: float,
    text_temperature: float,
    visual_temperature: float,
) -> Tensor:
    """
    How well each token covers every word and every patch.

    Parameters
    ----------
    to_words
        ``[G, M, V]`` cosines of words and tokens; rows past a group's number of words are ignored.
    counts
        ``[G]`` long: that number.
    to_patches
        ``[G, V, V]`` cosines of patches.
    alpha, text_temperature, visual_temperature
        As in `MMTok`.

    Returns
    -------
    Tensor
        ``[G, M + V, V]``: softmax over tokens, divided by the number of words; below, by the number of patches, times
        ``alpha``.
    """
    is_word = torch.arange(to_words.shape[1], device=to_words.device) < counts[:, None]
    text = (to_words / text_temperature).softmax(dim=2) / counts.clamp(min=1)[:, None, None]
    image = (to_patches / visual_temperature).softmax(dim=2) / to_patches.shape[2]
    return torch.cat([text * is_word[..., None], alpha * image], dim=1)
