"""Comparisons made up for tests of the page: shapes of large models, numbers of a generator."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from lmmhooks.comparison import Candidate, Comparison, Run, Token, Trace
from lmmhooks.comparison.places import Cells
from lmmhooks.comparison.result import compared
from lmmhooks.geometry import CellGrid, Geometry
from lmmhooks.layout import VisualSpan
from lmmhooks.stats import LayerStats, Stats
from lmmhooks.vision import ImageTokens

VOCABULARY = 50


def trace(
    *, tokens: int, layers: int, side: int, seed: int = 0, texts: list[str] | None = None, sink: int | None = None
) -> Trace:
    """An answer about an image of side x side tokens; optionally with a sink."""
    generator = torch.Generator().manual_seed(seed)
    num = side * side
    scores = 2 * torch.randn(tokens, layers, num + 3, generator=generator)
    if sink is not None:
        scores[..., 1 + sink] = 8
    rows = scores.softmax(dim=-1)
    favoured = torch.zeros(tokens, layers, num)
    if sink is not None:
        favoured[..., sink] = 1
    logp = torch.randn(tokens, VOCABULARY, generator=generator).log_softmax(dim=-1)
    ids = torch.arange(tokens) % VOCABULARY
    raster = ImageTokens.raster([(side, side)])
    visual = rows[..., 1:-2]
    shares = torch.stack([rows[..., 0], visual.sum(-1), rows[..., -2], rows[..., -1]], dim=-1)
    top = tuple(tuple(Candidate(f" word{k}", 0.4 / (k + 1)) for k in range(5)) for _ in range(tokens))
    return Trace(
        tokens=tuple(ids.tolist()),
        texts=tuple(texts or [f" t{t}" for t in range(tokens)]),
        logp=logp.gather(1, ids[:, None])[:, 0],
        rank=torch.ones(tokens, dtype=torch.long),
        candidates=top,
        shares=shares,
        visual=visual,
        favoured=favoured,
        spans=(VisualSpan(0, 0, 0, "image", torch.arange(1, num + 1), raster),),
        distribution=logp,
    )


def cells(side: int, size: tuple[int, int]) -> Cells:
    """One grid over the whole image."""
    box = (0.0, 0.0, float(size[0]), float(size[1]))
    grid = CellGrid(torch.arange(side * side).view(side, side), box, "image")
    geometry = Geometry(size, side * side, (grid,))
    return Cells(geometry, torch.arange(side * side), side, side, box, torch.ones(side * side, dtype=torch.float64))


def run(name: str, led: Trace, *, size: tuple[int, int], text: str = "an answer", own: Trace | None = None) -> Run:
    """A run that was led along an answer."""
    num = led.visual.shape[-1]
    layers = tuple(LayerStats(layer, (num,), (num,), 100, None) for layer in range(led.visual.shape[1]))
    return Run(
        name=name,
        text=text,
        tokens=tuple(Token(piece, 0.5) for piece in led.texts),
        visual_share=tuple(led.shares[0, :, 1].tolist()),
        image_map=None,
        kept=None,
        first_token_ms=10.0,
        total_ms=30.0,
        stats=Stats(layers, float(num), 1000, 1000, 1e6, 1e6),
        num_tokens=len(led.tokens),
        along=led,
        own=own or led,
        cells=(cells(math.isqrt(num), size),),
    )


def comparison(runs: list[Run], size: tuple[int, int], prompt: str = "What is this?") -> Comparison:
    """A comparison of runs, the first of which is the baseline."""
    base = runs[0].along
    others = [replace(each, difference=compared(base, each.along)) for each in runs[1:]]
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    return Comparison(prompt, image, (runs[0], *others), (image,))


def decoded(data: str, most: float) -> Tensor:
    """What the script of the page makes of a map."""
    import base64

    raw = torch.tensor(list(base64.b64decode(data)), dtype=torch.float64)
    return torch.where(raw == 255, torch.nan, most * (raw / 254) ** 2)
