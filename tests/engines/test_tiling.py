"""What a reducer of whole images is told about their crops: which one shows everything, and which tile stands where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.engines.grouping import find_groups, same_shape
from lmmhooks.layout import Layout, Segment, VisualSpan
from lmmhooks.methods.reduction.base import ReductionMethod
from lmmhooks.vision import ImageTokens, Tiling
from tests.zoo import build


def layout_of(*images: ImageTokens) -> Layout:
    """One row: a word before every image."""
    row: list[int] = []
    spans = []
    for number, tokens in enumerate(images):
        row.append(Segment.SYSTEM)
        positions = torch.arange(len(row), len(row) + len(tokens))
        spans.append(VisualSpan(0, number, number, "image", positions, tokens))
        row += [Segment.VISUAL] * len(tokens)
    return Layout(torch.tensor([row], dtype=torch.int8), tuple(spans))


def test_images_are_reduced_in_one_call_only_if_their_tiles_stand_alike():
    tall, wide = (replace(ImageTokens.raster([(2, 2)] * 3), tiling=Tiling(0, 2, grid)) for grid in ((2, 1), (1, 2)))
    layout = layout_of(tall, wide, tall)
    groups = find_groups(layout, "image", "drop")
    assert [group.tiling for group in groups] == [tall.tiling, wide.tiling, tall.tiling]
    assert same_shape(groups) == [[0, 2], [1]]
    # On their own, crops are alike whichever they are.
    assert same_shape(find_groups(layout, "crop", "drop")) == [list(range(9))]
    (together,) = find_groups(layout, "sample", "drop")
    assert together.tiling is None
    assert together.crop.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + ([0] * 4 + [1] * 4 + [2] * 4) * 2


def test_tiling_survives_the_loss_of_tokens():
    tokens = replace(ImageTokens.raster([(2, 2)] * 3), tiling=Tiling(2, 2))
    assert tokens.subset(torch.tensor([0, 5])).tiling == tokens.tiling
    assert Tiling(2, 2).tiles == [0, 1]
    assert Tiling(0, 2).tiles == [1, 2]


@dataclass(frozen=True)
class Noting(ReductionMethod):
    """Keeps the first tokens of every image and notes what it was told."""

    id: ClassVar[str] = "test-noting"

    seen: tuple[list, ...] = ()

    def select(self, tokens):
        self.seen[0].append((tokens.crop, tokens.tiling))
        return torch.arange(tokens.num_keep).expand(len(tokens.sample), -1)


@pytest.mark.parametrize(
    ("family", "tilings"),
    [
        # Images of 32 x 24, 12 x 32 and 32 x 16 pixels, in tiles of 16 x 16.
        ("llava_next", [Tiling(0, 4, (2, 2)), Tiling(0, 2, (1, 2)), Tiling(0, 2, (2, 1))]),
        ("llava_onevision", [Tiling(0, 4, (2, 2)), Tiling(0, 2, (1, 2)), Tiling(0, 2, (2, 1))]),
        # Three tiles, one, and two, of which the last is the thumbnail.
        ("internvl", [Tiling(2, 2), None, Tiling(1, 1)]),
        ("qwen2_5_vl", [None, None, None]),
        ("llava", [None]),
    ],
)
def test_families_tell_how_crops_belong_together(family, tilings):
    zoo = build(family)
    inputs = zoo.inputs(batch=len(tilings))
    seen: list = []
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Noting(keep=2, seen=(seen,))):
        zoo.model(**inputs)
    assert [tiling for _, tiling in seen] == tilings
    for crop, tiling in seen:
        assert crop.unique().tolist() == list(range(1 if tiling is None else tiling.num_tiles + 1))
