"""Any map with any operator: the same pictures as the methods make themselves."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.refinement.base import LookAgain
from lmmhooks.methods.refinement.refine import Refine
from lmmhooks.prompting import answer
from tests.methods.looked import PROMPT, looked, models, picture  # noqa: F401 # fixtures

MAPS = (
    "carve(read_layers=(3, 4), max_new_tokens=3)",
    "vicrop-rel(layer=3, base_size=56)",
    "vicrop-grad(layer=3, base_size=56)",
    "api(layer=3)",
    "attwarp(layer=3)",
    "fgvp(map='vicrop-rel(layer=3)')",
)


@pytest.mark.parametrize("spec", MAPS)
def test_a_method_of_its_own_parts_is_the_method(models, picture, monkeypatch, spec):  # noqa: F811
    model, _, processor = models
    text, found, shown = looked(monkeypatch, model, processor, spec, picture)
    again, same, pictures = looked(monkeypatch, model, processor, Refine(map=spec, operator=spec), picture)
    torch.testing.assert_close(same.values, found.values)
    assert [image.tobytes() for image in pictures] == [image.tobytes() for image in shown]
    assert again == text


@pytest.mark.parametrize("source", MAPS[:4])
@pytest.mark.parametrize("operator", MAPS)
def test_every_map_goes_with_every_operator(models, picture, monkeypatch, source, operator):  # noqa: F811
    model, _, processor = models
    _, found, _ = looked(monkeypatch, model, processor, source, picture)
    text, _, shown = looked(monkeypatch, model, processor, Refine(map=source, operator=operator), picture)
    painter = lmmhooks.methods.resolve(operator)
    expected = painter.shown(picture, painter.refined(picture, found))
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in expected]
    assert text == answer(model, processor, shown, PROMPT, max_new_tokens=4)


def test_which_pictures_are_shown(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    assert Refine(operator="api").show == "refined"
    assert Refine(operator="carve").show == "both"
    for show, number in (("both", 2), ("refined", 1)):
        _, _, shown = looked(monkeypatch, model, processor, Refine(map=MAPS[1], operator="api", show=show), picture)
        assert len(shown) == number


def test_settings_of_both_are_filled_in_and_checked(models):  # noqa: F811
    model, _, processor = models
    with lmmhooks.wrap(model, "refine(map='vicrop-rel', operator='api')", processor=processor) as patch:
        [method] = patch.methods
        assert (method.source.layer, method.painter.layer) == (4, 5)
        assert lmmhooks.methods.resolve(method.spec()) == method
    for spec in ("refine(map='vicrop-rel(layer=9)')", "refine(map='vicrop-rel', operator='api(layer=9)')"):
        with pytest.raises(MethodError, match="layer=9 is not allowed"):
            lmmhooks.wrap(model, spec, processor=processor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"map": "fastv(keep=8)"}, "map="), ({"operator": "zoomeye"}, "operator="), ({"map": "carv"}, "carve"),
     ({"show": "all"}, "show"), ({"operator": "api(strength=9)"}, "strength")],
)  # fmt: skip
def test_what_makes_no_map_or_picture_is_refused(settings, message):
    with pytest.raises(MethodError, match=message):
        Refine(**settings)


def test_every_method_of_the_common_shape_can_be_named():
    shaped = [name for name, cls in lmmhooks.methods(kind="refinement").items() if issubclass(cls, LookAgain)]
    assert {"carve", "vicrop-rel", "vicrop-grad", "vicrop-pure-grad", "api", "api-clip", "attwarp", "fgvp"} <= set(
        shaped
    )
    for name in shaped:
        if name != "refine":
            assert Refine(map=name, operator=name).source.id == name
