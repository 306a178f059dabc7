"""HiRED against lists: thumbnail, content, budgets of the tiles."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.hired import HiRED, block_regions, strip_regions, tile_budgets
from tests.methods.tower_readings import FAMILIES, check, untouched
from tests.reference import tower_reducers as naive
from tests.zoo import build

#: Early and late layer, and the crop that shows the whole image.
LAYERS = {"llava_next": (0, 1), "llava": (0, 1), "internvl": (0, 2), "qwen2_5_vl": (1, 3), "qwen3_vl": (0, 3)}


def regions_of(crops, region: str) -> list[int]:
    """Tile of every thumbnail token of a LLaVA-NeXT image; its tiles' columns are told by the order of tokens."""
    overview, *tiles = crops
    rows, cols = overview.grid
    if region == "strip":
        run = rows * cols / len(tiles)
        return [int(cell // run) for cell in overview.cells]
    # A row of the mosaic runs through all tiles that stand side by side, before the first tile's next row.
    across = sum(tile.numbers[0] < tiles[0].numbers[-1] for tile in tiles)
    down = len(tiles) // across
    return [(cell // cols) * down // rows * across + (cell % cols) * across // cols for cell in overview.cells]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("family", "region"),
    # InternVL does not tell how its tiles stand: see the next test.
    [
        (family, region)
        for family in FAMILIES
        for region in ("strip", "block")
        if (family, region) != ("internvl", "block")
    ],
)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, region, exact):
    early, late = LAYERS[family]

    def rule(crops):
        # InternVL's thumbnail comes last.
        order = [crops[-1], *crops[:-1]] if family == "internvl" else crops
        total = max(1, int(sum(len(crop.numbers) for crop in crops) * 0.4))
        scores = [crop.salient(late) for crop in order]
        if len(crops) == 1:
            return [untouched(sorted(naive.top(scores[0], total)))]
        regions = regions_of(order, region)
        kept = naive.hired(order[0].salient(early), scores, total, 0.5, regions, exact)
        kept = [*kept[1:], kept[0]] if family == "internvl" else kept
        return [untouched(stay) for stay in kept]

    check(family, HiRED(keep=0.4, region=region, exact_budget=exact), rule)


def test_blocks_need_to_know_how_tiles_stand():
    zoo = build("internvl")
    inputs = zoo.inputs(batch=1)
    lmmhooks.wrap(zoo.model, "hired(keep=0.4, region='block')")
    with torch.no_grad(), pytest.raises(lmmhooks.MethodError, match="internvl does not tell; use region='strip'"):
        zoo.model(**inputs)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sizes", [[576] * 4, [576, 192], [40, 576, 576], [576] * 3])
@pytest.mark.parametrize(("total", "alpha"), [(576, 0.5), (700, 0.1), (230, 0.7), (50, 0.99), (100, 0.0)])
def test_budgets_equal_loops_on_random_scores(sizes, total, alpha, exact):
    scores = draw(3, 576)
    regions = strip_regions(576, len(sizes))
    rest = min(total - min(int(total * alpha), 576), sum(sizes))
    budgets = tile_budgets(scores, regions, sizes, int(576 * (1 - alpha)), rest, exact=exact)
    for g in range(3):
        late = [[0.0] * size for size in [576, *sizes]]
        expected = naive.hired(scores[g].tolist(), late, total, alpha, regions.tolist(), exact)
        assert budgets[g].tolist() == [len(stay) for stay in expected[1:]]
    assert (budgets.sum(dim=1) <= rest).all()
    assert not exact or (budgets.sum(dim=1) == rest).all()
    assert (budgets <= torch.tensor(sizes)).all()


def test_content_in_one_strip_draws_the_budget_of_one_tile():
    scores = torch.zeros(1, 16)
    scores[0, :8] = 1.0
    strips = tile_budgets(scores, strip_regions(16, 4), [16] * 4, 8, 10, exact=False)
    assert strips.tolist() == [[5, 5, 0, 0]], "rows 0 and 1 are the first two strips"
    row, col = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    blocks = block_regions(row, col, (2, 2))
    assert tile_budgets(scores, blocks, [16] * 4, 8, 10, exact=False).tolist() == [[5, 5, 0, 0]]
    # The left half of the image: two tiles to the left, but half of every strip.
    scores = (col < 2).float()[None]
    assert tile_budgets(scores, blocks, [16] * 4, 8, 10, exact=False).tolist() == [[5, 0, 5, 0]]
    assert tile_budgets(scores, strip_regions(16, 4), [16] * 4, 8, 10, exact=False).tolist() == [[2, 2, 2, 2]]
    assert tile_budgets(scores, strip_regions(16, 4), [16] * 4, 8, 10, exact=True).tolist() == [[3, 3, 2, 2]]


def test_a_full_tile_passes_on_what_it_cannot_take():
    scores = torch.zeros(1, 16)
    scores[0, :4] = 1.0
    assert tile_budgets(scores, strip_regions(16, 4), [3, 16, 16, 2], 4, 10, exact=False).tolist() == [[3, 0, 0, 0]]
    assert tile_budgets(scores, strip_regions(16, 4), [3, 16, 2, 2], 4, 10, exact=True).sum() == 10


def test_regions_have_edges_rounded_down():
    assert strip_regions(16, 4).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    # 729 tokens of 27 x 27 in two rows of tiles: 13 and 14 rows.
    row, col = torch.arange(27).repeat_interleave(27), torch.arange(27).repeat(27)
    blocks = block_regions(row, col, (2, 1)).view(27, 27)
    assert (blocks[:13] == 0).all()
    assert (blocks[13:] == 1).all()
    assert strip_regions(729, 2).bincount().tolist() == [364, 365]
    assert block_regions(row, col, (2, 2)).bincount().tolist() == [169, 182, 182, 196]


@pytest.mark.parametrize(("alpha", "thumbnail"), [(0.5, 7), (1.0, 15), (0.0, 0)])
def test_the_thumbnail_gets_its_share(alpha, thumbnail):
    zoo = build("llava_next")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, HiRED(keep=15, alpha=alpha)):
        zoo.model(**inputs)
        (span,) = find_runtime(zoo.model).last.stages[0].layout.spans
    assert int((span.tokens.crop == 0).sum()) == thumbnail
    assert len(span) <= 15
    assert alpha < 1 or len(span) == thumbnail, "nothing is left for tiles"


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_an_image_of_one_crop_is_reduced_as_by_fastervlm(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    index = []
    for spec in ("hired(keep=5)", "fastervlm(keep=5)"):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, spec):
            zoo.model(**inputs)
            index.append(find_runtime(zoo.model).last.stages[0].index)
    assert torch.equal(*index)


def test_frames_of_a_video_share_evenly():
    zoo = build("llava_onevision")
    inputs = zoo.inputs(batch=1, images=0, videos=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "hired(keep=7)"):
        zoo.model(**inputs)
        (span,) = find_runtime(zoo.model).last.stages[0].layout.spans
    assert span.tokens.crop.bincount().tolist() == [3, 2, 2]


def test_layers_are_the_first_and_the_one_that_the_projector_reads():
    def layers(family):
        return [(probe.signal, probe.layer) for probe in HiRED(keep=4).probes(resolve(build(family).model))]

    assert layers("llava") == [("vision_cls", 0), ("vision_cls", 1)]
    assert layers("qwen2_5_vl") == [("vision_received", 1), ("vision_received", 3)]


@pytest.mark.parametrize("settings", [{"alpha": 1.1}, {"region": "row"}, {"keep_per": "crop"}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("hired", keep=4, **settings)
