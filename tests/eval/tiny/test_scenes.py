"""The scene generator: deterministic, exactly annotated, and with the priors that make models hallucinate."""

from __future__ import annotations

import numpy as np
import pytest

from lmmhooks_eval.tiny.batches import draw_scenes
from lmmhooks_eval.tiny.heads import BACKGROUND, PATCH, scene_targets
from lmmhooks_eval.tiny.render import LEVEL_STEP, render
from lmmhooks_eval.tiny.scenes import IMAGE_SIZE, MAX_CATEGORIES, MAX_OBJECTS, Scene, SceneObject, sample_scene
from lmmhooks_eval.tiny.shapes import SILHOUETTES, mask, tight_box
from lmmhooks_eval.tiny.vocabulary import BY_NAME, CATEGORIES, CATEGORY_INDEX, THEMES


def scenes(number: int, seed: int = 3) -> list[Scene]:
    return [sample_scene(np.random.default_rng((seed, index))) for index in range(number)]


def test_same_entropy_gives_the_same_scene_and_pixels() -> None:
    first, pixels = draw_scenes((1, 2), 3)
    again, same_pixels = draw_scenes((1, 2), 3)
    other, other_pixels = draw_scenes((1, 3), 3)
    assert first == again
    assert np.array_equal(pixels, same_pixels)
    assert first != other
    assert not np.array_equal(pixels, other_pixels)


@pytest.mark.parametrize("category", sorted(SILHOUETTES))
@pytest.mark.parametrize("extent", [13, 26])
def test_boxes_are_tight_around_the_mask(category: str, extent: int) -> None:
    x0, y0, x1, y1 = tight_box(category, extent)
    solid = mask(category, extent) >= 0.5
    outside = solid.copy()
    outside[y0:y1, x0:x1] = False
    assert not outside.any()
    for edge in (solid[y0, x0:x1], solid[y1 - 1, x0:x1], solid[y0:y1, x0], solid[y0:y1, x1 - 1]):
        assert edge.any()


def test_rendered_object_lies_exactly_in_its_box() -> None:
    background = Scene("sky", "sky", 0.0, ())
    item = SceneObject("anchor", "black", "large", 24, 40, 61, 1.0)
    with_object = Scene("sky", "sky", 0.0, (item,))
    plain = render(background, np.random.default_rng(0)).astype(int)
    drawn = render(with_object, np.random.default_rng(0)).astype(int)
    change = np.abs(drawn - plain).max(axis=-1)
    full, (x0, y0, x1, y1) = change.max(), item.box
    inside = np.zeros_like(change, dtype=bool)
    inside[y0:y1, x0:x1] = True
    # Pixels outside are covered by less than one half; the texture under the object varies contrast by up to a third
    # and quantisation adds one level.
    assert change[~inside].max() <= full / 2 + LEVEL_STEP
    for edge in (change[y0, x0:x1], change[y1 - 1, x0:x1], change[y0:y1, x0], change[y0:y1, x1 - 1]):
        assert edge.max() >= full / 3 - LEVEL_STEP


def test_objects_stay_inside_and_never_overlap() -> None:
    for scene in scenes(300):
        assert 1 <= len(scene.objects) <= MAX_OBJECTS
        assert len(scene.present) <= MAX_CATEGORIES
        taken = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= IMAGE_SIZE
            assert 0 <= y0 < y1 <= IMAGE_SIZE
            taken[y0:y1, x0:x1] += 1
        assert taken.max() == 1


def test_silhouettes_differ_pairwise_at_the_smallest_size() -> None:
    masks = {name: mask(name, 13) for name in SILHOUETTES}
    names = sorted(masks)
    # The closest pair (balloon, sign) differs by 7.4 of 169 pixels, a fifth of its area.
    assert all(np.abs(masks[a] - masks[b]).sum() > 6 for i, a in enumerate(names) for b in names[i + 1 :])


def test_pixels_are_quantised() -> None:
    _, images = draw_scenes((5,), 2)
    assert images.dtype == np.uint8
    assert images.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.all(images % LEVEL_STEP == LEVEL_STEP // 2)


def test_theme_and_colour_priors_exist() -> None:
    drawn = scenes(600)
    in_theme = np.mean([sum(BY_NAME[name].theme == scene.theme for name in scene.present) for scene in drawn])
    off_theme = np.mean([sum(BY_NAME[name].theme != scene.theme for name in scene.present) for scene in drawn])
    absent_in_theme = np.mean([sum(name not in scene.present for name in THEMES[scene.theme]) for scene in drawn])
    objects = [item for scene in drawn for item in scene.objects]
    preferred = np.mean([item.colour == BY_NAME[item.category].preferred_colour for item in objects])
    # Expected 3.2, 0.8 and 2.7 categories and a share of 0.5 + 0.5 / 8; the bands are over five standard errors wide.
    assert 2.9 < in_theme < 3.6
    assert 0.5 < off_theme < 1.1
    assert absent_in_theme > 2.2
    assert 0.51 < preferred < 0.62


def test_every_theme_offers_adversarial_negatives() -> None:
    assert {len(members) for members in THEMES.values()} == {6}
    assert sum(map(len, THEMES.values())) == len(CATEGORIES) == len(SILHOUETTES)


def test_dense_targets_follow_the_boxes() -> None:
    drawn, _ = draw_scenes((8,), 20)
    targets = scene_targets(drawn)
    for row, scene in enumerate(drawn):
        grid = targets.categories[row].view(8, 8)
        labels = set(grid.unique().tolist()) - {BACKGROUND}
        assert labels <= {CATEGORY_INDEX[name] for name in scene.present}
        for item in scene.objects:
            row_of_centre = int(item.centre[1]) // PATCH
            if item.size == "large" and mask(item.category, item.extent)[item.extent // 2, item.extent // 2] == 1.0:
                assert CATEGORY_INDEX[item.category] in grid[max(0, row_of_centre - 1) : row_of_centre + 2]
        assert targets.presence[row].sum() == len(scene.present)
