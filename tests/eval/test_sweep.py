"""Sweeps: what the shorthand stands for, and what their results page claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.recipe import Recipe
from lmmhooks_eval.report.sweep import sweep_page, sweep_record
from lmmhooks_eval.report.sweep_plot import sweep_plot
from lmmhooks_eval.sweep import split_name, variant_name
from tests.eval.runs import answer, documents, opposite, perfect, write_run
from tests.eval.test_markdown import ENVIRONMENT

SWEEP = {
    "budgets": [0.5, 0.125],
    "methods": {
        "random": "random",
        "downsample": "downsample",
        "fastv": {"method": "fastv(layer=1)", "budgets": [0.5]},
        "fastervlm": {"fastervlm": {"layer": 1}},
    },
}


def test_a_sweep_stands_for_variants() -> None:
    recipe = Recipe.model_validate({"name": "r", "model": "tiny-llava", "tasks": ["scenes-pope"], "sweep": SWEEP})
    assert list(recipe.variants) == [
        *("random@50", "random@12.5", "downsample@50", "downsample@12.5"),
        *("fastv@50", "fastervlm@50", "fastervlm@12.5"),
    ]
    built = recipe.methods()
    assert [built[name][0].budget for name in recipe.variants] == [0.5, 0.125, 0.5, 0.125, 0.5, 0.5, 0.125]
    assert built["fastv@50"][0].layer == built["fastervlm@50"][0].layer == 1


def test_methods_without_budget_are_given_the_share_they_keep() -> None:
    sweep = {"budgets": [0.5], "methods": {"tome": {"method": "tome", "setting": "keep"}}}
    recipe = Recipe.model_validate({"name": "r", "model": "tiny-llava", "tasks": ["scenes-pope"], "sweep": sweep})
    assert recipe.methods()["tome@50"][0].keep == 0.5


def test_variants_beside_a_sweep_stay_and_an_expanded_recipe_is_one_again() -> None:
    data = {"name": "r", "model": "tiny-llava", "tasks": ["scenes-pope"], "sweep": SWEEP, "variants": {"v": "var"}}
    recipe = Recipe.model_validate(data)
    assert "v" in recipe.variants
    again = Recipe.model_validate(recipe.expanded())
    assert list(again.variants) == list(recipe.variants)
    assert again.expanded() == recipe.expanded()


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ({"budgets": [], "methods": {"random": "random"}}, "at least 1"),
        ({"budgets": [1.5], "methods": {"random": "random"}}, "less than or equal to 1"),
        ({"budgets": [0.5], "methods": {}}, "at least 1"),
        ({"budgets": [0.5], "methods": {"a": {"method": "tome", "setting": "r"}}}, "'budget' or 'keep'"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(sweep: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Recipe.model_validate({"name": "r", "model": "tiny-llava", "tasks": ["scenes-pope"], "sweep": sweep})


def test_names_of_variants_carry_the_budget() -> None:
    assert variant_name("random", 0.125) == "random@12.5"
    assert split_name("random@12.5") == ("random", 0.125)
    assert split_name("baseline") is None
    assert split_name("mail@home") is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """
    The baseline is right; half of the pixels lose every second document, random tokens two of three.

    `fastervlm` loses none at one budget and all at the other.
    """
    docs = documents()
    records = [answer(doc, "baseline", perfect(doc)) for doc in docs]
    for variant, right in {
        "random@50": lambda i: i % 3 == 0,
        "random@12.5": lambda i: i % 3 == 0,
        "downsample@50": lambda i: i % 2 == 0,
        "downsample@12.5": lambda i: True,
        "fastv@50": lambda i: i % 3 == 0,
        "fastervlm@50": lambda i: True,
        "fastervlm@12.5": lambda i: False,
    }.items():
        records += [answer(doc, variant, perfect(doc) if right(i) else opposite(doc)) for i, doc in enumerate(docs)]
    return write_run(tmp_path / "run", records, sweep=SWEEP, variants={})


def test_methods_stand_beside_random_tokens_of_their_budget(run: Path) -> None:
    record = json.loads(json.dumps(sweep_record(run, ENVIRONMENT)))
    points = {(p["method"], p["budget"]): p for p in record["tasks"]["scenes-pope"]["points"]}
    assert points["random", 0.5]["against"] is None
    assert points["fastv", 0.5]["against"]["difference"] == 0
    chance = points["random", 0.5]["value"]
    assert points["fastervlm", 0.5]["against"]["difference"] == pytest.approx(1 - chance)
    assert points["fastervlm", 0.125]["against"]["difference"] == pytest.approx(-chance)
    assert points["fastervlm", 0.5]["cost"]["tokens"] == 0.5  # as the lines say
    page = sweep_page(record, "a.json")
    assert "- 50 %: better than random tokens `fastervlm`; worse none." in page
    assert "- 12.5 %: better than random tokens `downsample`; worse `fastervlm`." in page
    assert f"**100.0 ({100 * (1 - chance):+.1f})**" in page
    assert f"| `fastv` | {100 * chance:.1f} (+0.0) | - |" in page
    assert page.index("`downsample` |") < page.index("`fastervlm` |") < page.index("`fastv` |")


def test_methods_that_choose_their_number_stand_apart_with_the_tokens_they_kept(tmp_path: Path) -> None:
    docs = documents()
    texts = {"baseline": perfect, "random@50": opposite, "prumerge": perfect}
    records = [answer(doc, variant, text(doc)) for variant, text in texts.items() for doc in docs]
    sweep = {"budgets": [0.5], "methods": {"random": "random"}}
    run = write_run(tmp_path / "run", records, sweep=sweep, variants={"prumerge": ["var"]})
    record = sweep_record(run, ENVIRONMENT)
    (own,) = record["tasks"]["scenes-pope"]["own_number"]
    assert (own["variant"], own["cost"]["tokens"], own["value"]) == ("prumerge", 0.5, 1.0)
    assert "| `prumerge` | 50.0 | 100.0 | +0.0 [+0.0, +0.0] |" in sweep_page(record, "a.json")


def test_group_a_is_what_the_full_image_answers_and_fewer_pixels_do_not(run: Path) -> None:
    record = sweep_record(run, ENVIRONMENT)
    points = {(p["method"], p["budget"]): p["group_a"] for p in record["tasks"]["scenes-pope"]["points"]}
    assert points["fastervlm", 0.5]["n"] == 18
    assert points["fastervlm", 0.5]["value"] == 1.0
    assert points["random", 0.5]["value"] == pytest.approx(6 / 18)
    assert points["downsample", 0.5]["value"] == 0.0
    assert points["fastervlm", 0.125] == {"n": 0, "value": None, "interval": None}
    page = sweep_page(record, "a.json")
    assert "group A, % right | 50 % (n = 18) |" in page


def test_the_plot_names_controls_and_leaders_and_is_the_same_each_time(run: Path) -> None:
    task = sweep_record(run, ENVIRONMENT)["tasks"]["scenes-pope"]
    svg = sweep_plot(task, "scenes-pope")
    assert svg == sweep_plot(task, "scenes-pope")
    assert "FLOPs of the prompt" in svg
    assert "prefill time" in sweep_plot(task, "scenes-pope", times=True)
    for name in ("random", "downsample", "fastervlm"):
        assert f">{name}<" in svg


def test_a_run_without_a_sweep_is_refused(tmp_path: Path) -> None:
    docs = documents()
    records = [answer(doc, variant, perfect(doc)) for variant in ("baseline", "v") for doc in docs]
    with pytest.raises(RecipeError, match="was no sweep"):
        sweep_record(write_run(tmp_path / "run", records), ENVIRONMENT)
