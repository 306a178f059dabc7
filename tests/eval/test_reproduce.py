"""Recipes that reproduce papers: each has an offline twin, and every attention method runs on a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lmmhooks
from lmmhooks_eval import recipes
from lmmhooks_eval import runner as runner_module
from lmmhooks_eval.loading import load_model
from lmmhooks_eval.recipe import Recipe
from lmmhooks_eval.runner import run
from lmmhooks_eval.score import score_run

TWINS = {"chair": "scenes-caption", "pope": "scenes-pope"}
REPRODUCE = [name for name in recipes.shipped() if name.startswith("reproduce/") and "/offline/" not in name]
OFFLINE = [name for name in recipes.shipped() if "/offline/" in name]
SCENES = ("attention-scenes-llava", "attention-scenes-qwen")


def attention_methods() -> set[str]:
    return {name for name, cls in lmmhooks.methods().items() if cls.kind == "attention" and "identity" not in name}


def of_papers() -> list[str]:
    """Recipes with figures of a method; LLaVA's own baseline has none."""
    return [name for name in REPRODUCE if recipes.load(name).variants]


@pytest.mark.parametrize("name", of_papers())
def test_every_recipe_of_a_paper_has_an_offline_twin(name: str) -> None:
    recipe = recipes.load(name)
    (plan,) = recipe.tasks
    method = name.removeprefix("reproduce/").removesuffix(f"-llava-1.5-7b-{plan.name}")
    twin = recipes.load(f"reproduce/offline/{method}-tiny-llava-{TWINS[plan.name]}")
    assert [each.name for each in twin.tasks] == [TWINS[plan.name]]
    assert twin.model == "tiny-llava"
    assert list(twin.variants) == list(recipe.variants)
    ours, theirs = twin.methods(), recipe.methods()
    for variant in recipe.variants:
        (small,), (full,) = ours[variant], theirs[variant]
        assert small.id == full.id == method
        # Sink channels belong to a checkpoint; everything else is the same setting.
        differing = {key for key, value in small.settings().items() if value != full.settings()[key]}
        assert differing <= {"sink_dims"}
    sampling = {"do_sample", "temperature", "top_p"}
    generation = {key: value for key, value in plan.generation.given().items() if key in sampling}
    assert {key: value for key, value in twin.tasks[0].generation.given().items() if key in sampling} == generation


@pytest.mark.parametrize("name", REPRODUCE)
def test_every_recipe_of_a_paper_states_figures_and_their_place(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.paper
    assert recipe.system is not None
    figures = {
        variant
        for paper in recipe.paper
        for by_metric in paper.results.values()
        for by_variant in by_metric.values()
        for variant in by_variant
    }
    assert "baseline" in figures
    for paper in recipe.paper:
        assert "arXiv" in paper.source, "a source that can be looked up"


@pytest.mark.parametrize("name", SCENES)
def test_the_scenes_recipes_hold_every_attention_method(name: str) -> None:
    methods = recipes.load(name).methods()
    assert {method.id for built in methods.values() for method in built} == attention_methods()


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(recipes.load("attention-scenes-llava"))


def _small(recipe: Recipe) -> Recipe:
    """The recipe on a handful of documents with short answers."""
    changes = []
    for plan in recipe.tasks:
        shorter = plan.generation.model_copy(update={"max_new_tokens": 6})
        changes.append(plan.model_copy(update={"limit": 6, "generation": shorter}))
    statistics = recipe.statistics.model_copy(update={"draws": 100})
    return recipe.model_copy(
        update={"tasks": changes, "self_test": 1, "statistics": statistics, "max_unparsed": 1.0, "batch_size": 6}
    )


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_twins_run(name: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "load_model", lambda recipe: loaded)
    recipe = _small(recipes.load(name))
    assert run(recipe, tmp_path / "run") == []
    scored = score_run(tmp_path / "run")
    assert scored["problems"] == []
    (task,) = scored["tasks"].values()
    assert list(task["variants"]) == ["baseline", *recipe.variants]


@pytest.mark.slow
def test_every_attention_method_runs_on_the_trained_model(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "load_model", lambda recipe: loaded)
    recipe = _small(recipes.load("attention-scenes-llava"))
    assert run(recipe, tmp_path / "run") == []
    scored = score_run(tmp_path / "run")
    assert scored["problems"] == []
    for task in scored["tasks"].values():
        assert set(task["variants"]) == {"baseline", *recipe.variants}
        assert all(figures["n"] > 0 for figures in task["variants"].values())
