"""
TVC: show the image again, 16 times smaller, in the middle of a long answer that has begun to forget it.

Paper: "Mitigating Visual Forgetting via Take-along Visual Conditioning for Multi-modal Long CoT Reasoning", ACL 2025,
arXiv 2503.13360. Code: github.com/sun-hailong/TVC (training only; the inference part was never released).
UNVERIFIED: whether 4x4 is the pooling window or the pooled grid (``mode``), and the wording of bridge and markers.
Differs from the paper in that the cache goes on instead of being read again without the first image: `generate` holds
the prompt, which its caller would have to rebuild. The paper's figures are of fine-tuned models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.injecting import InjectionMethod, Pooling
from lmmhooks.vision import ImageTokens

__all__ = ["TVC", "adaptive_cells", "window_cells"]


@dataclass(frozen=True)
class TVC(InjectionMethod):
    """
    Appends bridge text and average-pooled images at fixed places of the answer or behind words of reflection.

    Every crop of an image is pooled on its own grid; tokens without a place in it (newlines) and videos are left out.
    Generation without a cache reads everything anew at every step and is not touched.
    """

    id: ClassVar[str] = "tvc"
    paper: ClassVar[str] = "Take-along Visual Conditioning, ACL 2025, arXiv 2503.13360"
    code: ClassVar[str] = "https://github.com/sun-hailong/TVC"

    bridge: str | tuple[int, ...] = setting(
        "Let me see the image again.", help="Text before the image, or its token ids; UNVERIFIED wording."
    )
    trigger: Literal["fraction", "every", "marker"] = setting(
        "fraction",
        help="'fraction': once, at that share of expected_length (paper: the middle); 'every': each time as many "
        "tokens were generated; 'marker': behind one of the markers.",
    )
    fraction: float = setting(0.5, help="Share of expected_length, in (0, 1]; paper: 0.5.")
    expected_length: int = setting(512, help="Tokens an answer is expected to have, >= 1; depends on the task.")
    every: int = setting(256, help="Tokens between injections, >= 1.")
    markers: str | tuple[str, ...] = setting(
        ("Wait", "Hmm", "Let me check"), help="Ends of the answer so far that trigger; UNVERIFIED wording."
    )
    cooldown: int = setting(64, help="Tokens after an injection in which markers do not trigger, >= 0.")
    pooling: int = setting(4, help="Side of the pooling window, or of the pooled grid; >= 1 (paper: 4).")
    mode: Literal["window", "adaptive"] = setting(
        "window", help="'window': pooling x pooling cells become one; 'adaptive': every crop becomes pooling x pooling."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        markers = (self.markers,) if isinstance(self.markers, str) else tuple(self.markers)
        object.__setattr__(self, "markers", markers)
        self._require(self.trigger in ("fraction", "every", "marker"), "trigger", "'fraction', 'every' or 'marker'")
        self._require(0 < self.fraction <= 1, "fraction", "in (0, 1]")
        for name, least in (("expected_length", 1), ("every", 1), ("cooldown", 0), ("pooling", 1)):
            self._require(
                isinstance(getattr(self, name), int) and getattr(self, name) >= least, name, f"an integer >= {least}"
            )
        texts = all(isinstance(text, str) and text for text in markers)
        self._require(texts and bool(markers), "markers", "texts, at least one")
        self._require(self.mode in ("window", "adaptive"), "mode", "'window' or 'adaptive'")

    @property
    def reads_text(self) -> bool:
        return self.trigger == "marker"

    def due(self, generated: int, since: int | None, text: str) -> bool:
        if self.trigger == "fraction":
            return generated == max(1, int(self.fraction * self.expected_length))
        if self.trigger == "every":
            return generated % self.every == 0
        return (since is None or since >= self.cooldown) and text.rstrip().endswith(self.markers)

    def pool(self, tokens: ImageTokens) -> Pooling:
        if not bool((tokens.crop >= 0).any()):
            raise PromptError(
                "tvc pools images on their token grid, which is not known here; give the model pixels instead of "
                "features, or leave tvc out"
            )
        members, rows, cols = [], [], []
        for crop in range(len(tokens.grids)):
            inside = tokens.crop == crop
            if not bool(inside.any()):
                continue
            # Unpadding takes rows and columns off a crop: what is left is a grid of its own.
            row, col = tokens.row - tokens.row[inside].min(), tokens.col - tokens.col[inside].min()
            cells = window_cells if self.mode == "window" else adaptive_cells
            down = cells(row, int(row[inside].max()) + 1, self.pooling)
            across = cells(col, int(col[inside].max()) + 1, self.pooling)
            shared = (down[:, None] & across[None] & inside).flatten(0, 1)
            place = torch.arange(len(shared))
            filled = shared.any(dim=1)
            members.append(shared[filled])
            rows.append((place // len(across))[filled])
            cols.append((place % len(across))[filled])
        weights = torch.cat(members).float()
        return Pooling(weights / weights.sum(dim=1, keepdim=True), torch.cat(rows), torch.cat(cols))


def window_cells(index: Tensor, length: int, window: int) -> Tensor:
    """
    Which of the windows along one side holds a token.

    Parameters
    ----------
    index
        ``[V]`` row or column of every token, in [0, length).
    length
        Rows or columns there are.
    window
        Rows or columns of a window; the last window may have fewer, so that no cell is lost.

    Returns
    -------
    Tensor
        ``[ceil(length / window), V]`` bool.
    """
    return torch.arange(-(-length // window))[:, None] == index // window


def adaptive_cells(index: Tensor, length: int, size: int) -> Tensor:
    """As `window_cells`, for ``size`` windows that share the side evenly and may overlap: ``[size, V]``."""
    cell = torch.arange(size)[:, None]
    return (index >= cell * length // size) & (index < -(-(cell + 1) * length // size))
