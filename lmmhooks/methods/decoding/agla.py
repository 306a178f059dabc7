"""
AGLA: add what the model says to a copy of the image in which only what the prompt is about is left.

The original view is the global one, good for generating; the masked view is local, good for discriminating. What
matters is found by an image-text matching model and its gradients; everything else is black.

Paper: "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
Attention", CVPR 2025, arXiv 2406.12718. Code: https://github.com/Lackel/AGLA. Differs from the release in two points.
The masked view keeps its own keys and values; there it shares the original's from the second token on, which adds the
same logits once more (``first_token_only=True``). And it is made of the pixels the model was given, so that both views
are framed alike; there it is the raw image squeezed to a square. Crops of an image in tiles are matched and masked one
by one: UNVERIFIED. Which text the authors match in captioning is not in their code: it is the question here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.prompts import question_span
from lmmhooks.methods.decoding.relevance import BlipMatcher, check_matcher_folder, heat_map, hottest, num_hottest
from lmmhooks.methods.decoding.view import ImageView, StepView

__all__ = ["Agla", "crop_relevance"]


def crop_relevance(values: Tensor, image: ImageView, crop: int) -> Tensor:
    """
    One number per visual token as a grid of one crop.

    Parameters
    ----------
    values
        ``[n]``.
    image
        Whose tokens they are.
    crop
        Which crop.

    Returns
    -------
    Tensor
        float32 ``[rows, columns]``; 0 where the model took tokens away (unpadding).

    Raises
    ------
    PromptError
        The grid of the model's tokens is not known.
    """
    if crop >= len(image.tokens.grids):
        raise PromptError("where the visual tokens of this image lie is not known, so attention cannot mask its pixels")
    members = (image.tokens.crop == crop).nonzero().flatten()
    grid = torch.zeros(image.tokens.grids[crop])
    grid[image.tokens.row[members], image.tokens.col[members]] = values.float().cpu()[members]
    return grid


@dataclass(frozen=True)
class Agla(DecodingMethod):
    """Add the prediction of a view masked for the prompt: ``L + alpha L_masked`` on plausible tokens."""

    id: ClassVar[str] = "agla"
    paper: ClassVar[str] = "AGLA: Assembly of Global and Local Attention, CVPR 2025, arXiv 2406.12718"
    code: ClassVar[str] = "https://github.com/Lackel/AGLA"

    alpha: float = setting(2.0, help="Weight of the masked view, 0 or more (paper: 2); 0: no masked view.")
    beta: float = setting(0.5, help="Plausibility cut in [0, 1] (paper: 0.5).")
    relevance: str = setting(
        "matcher",
        help="What the mask is made of: 'matcher' (paper), 'attention' of the model's own last prompt token, mean over "
        "layers and heads (offline substitute, UNVERIFIED), or the path of a .npy file with a map [rows, columns].",
    )
    matcher: str | None = setting(
        None,
        help="Local folder of a BLIP matching model with tokenizer (paper: BLIP-ITM large, COCO; "
        "Salesforce/blip-itm-large-coco). Never downloaded.",
    )
    layer: int = setting(6, help="Layer of the matcher's text encoder, 0-based, that is read (released code: 6).")
    text: str | None = setting(None, help="What the image is matched with. None: the question of the prompt (paper).")
    similarity: float | None = setting(
        None,
        help="Similarity of text and image in [-1, 1]: the share 1 - similarity / 2 of the pixels stays. None: the "
        "matcher's; without one 0.4, about what it says of a fitting question (UNVERIFIED).",
    )
    first_token_only: bool = setting(
        False, help="Behind the first token add the original's logits once more, which the released code comes to."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        known = self.relevance in ("matcher", "attention") or self.relevance.endswith(".npy")
        self._require(known, "relevance", "'matcher', 'attention' or the path of a .npy file")
        self._require(self.relevance == "matcher" or not self.matcher, "matcher", "None unless relevance='matcher'")
        self._require(self.layer >= 0, "layer", "0 or more")
        self._require(self.similarity is None or -1 <= self.similarity <= 1, "similarity", "in [-1, 1], or None")

    @cached_property
    def _loaded(self) -> dict[torch.device, BlipMatcher]:
        """The matcher, by the device it was needed on."""
        return {}

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    @property
    def needs_tokenizer(self) -> bool:
        return self.alpha > 0 and self.relevance == "matcher" and self.text is None

    def check(self, family: Any) -> None:
        if not self.alpha or self.relevance == "attention":
            return
        if self.relevance != "matcher":
            if not Path(self.relevance).is_file():
                raise MethodError(f"{self.id}: relevance={self.relevance!r} does not exist; check the path")
        elif self.matcher is None:
            raise MethodError(
                f"{self.id}: matcher=None, but what matters is found by a matching model; give matcher=FOLDER of a "
                "local BLIP (Salesforce/blip-itm-large-coco), or relevance='attention' to do without"
            )
        else:
            check_matcher_folder(self.id, self.matcher, self.layer)

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("local", image="pixels", after_main=True)] if self.alpha else []

    def reads_prompt(self, family: Any) -> Sequence[int]:
        return range(family.num_layers) if self.alpha and self.relevance == "attention" else ()

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        if self.first_token_only and step:
            return [1 + self.alpha, 0.0]
        return [1.0, self.alpha]

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        black = context.from_rgb(torch.zeros_like(pixels[0]))
        assert context.image is not None
        # A token grid of Qwen shows two frames of a video.
        frames = max(len(pixels) // max(len(context.image.tokens.grids), 1), 1)
        masked = []
        for number, crop in enumerate(pixels):
            relevance, similarity = self._relevance(crop, context, context.crop + number // frames)
            height, width = crop.shape[-2:]
            heat = heat_map(relevance, (height, width))
            similarity = similarity if self.similarity is None else self.similarity
            keep = hottest(heat, num_hottest(height * width, similarity)).to(crop.device)
            masked.append(torch.where(keep, crop, black))
        return torch.stack(masked)

    def _relevance(self, pixels: Tensor, context: BranchContext, crop: int) -> tuple[Tensor, float]:
        image = context.image
        assert image is not None
        if self.relevance == "attention":
            assert image.attention is not None
            return crop_relevance(image.attention.mean(dim=0), image, crop), 0.4
        if self.relevance != "matcher":
            import numpy as np

            return torch.from_numpy(np.load(self.relevance)), 0.4
        text = self.text
        if text is None:
            start, stop = question_span(image.prompt, context) or (0, 0)
            text = context.tokenizer.decode(image.prompt[start:stop].tolist(), skip_special_tokens=True)
        assert self.matcher is not None
        if pixels.device not in self._loaded:
            self._loaded[pixels.device] = BlipMatcher(self.matcher, pixels.device)
        found = self._loaded[pixels.device].match(context.to_rgb(pixels), text, self.layer)
        context.notes.append({"image": context.index, "crop": crop, "text": text, "similarity": found[1]})
        return found
