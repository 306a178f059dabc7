"""Recipes: schema, overrides, errors that name the nearest key, and every shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lmmhooks.errors import MethodError
from lmmhooks_eval import recipes
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.paper import PaperFigures, check_figures
from lmmhooks_eval.recipe import DataPlan, Recipe, TaskPlan
from lmmhooks_eval.tasks import open_task

MINIMAL = {"name": "r", "model": "tiny-llava", "tasks": ["scenes-pope"]}


def _file(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_bare_task_and_a_bare_method_need_no_wrapping() -> None:
    call = recipes.build({**MINIMAL, "variants": {"v": "var(p=0.5)"}}, "here")
    mapping = recipes.build({**MINIMAL, "variants": {"v": {"var": {"p": 0.5}}}}, "here")
    assert call.tasks[0].name == "scenes-pope"
    assert call.methods() == mapping.methods()
    assert list(call.methods()) == ["baseline", "v"]
    assert call.methods()["baseline"] == ()


def test_expanded_recipe_is_a_recipe_with_every_setting() -> None:
    recipe = recipes.build({**MINIMAL, "variants": {"v": "var(p=0.5)"}}, "here")
    expanded = yaml.safe_load(yaml.safe_dump(recipe.expanded()))
    assert expanded["variants"]["v"][0]["var"]["p"] == 0.5
    assert expanded["variants"]["v"][0]["var"].keys() == recipe.methods()["v"][0].settings().keys()
    assert expanded["batch_size"] == 8
    again = recipes.build(expanded, "config.yaml")
    assert again.methods() == recipe.methods()
    assert again.expanded() == expanded


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"batchsize": 4}, ["unknown key 'batchsize'", "did you mean 'batch_size'?"]),
        ({"tasks": [{"name": "scenes-pope", "limt": 4}]}, ["'tasks.0.limt'", "did you mean 'limit'?"]),
        (
            {"tasks": [{"name": "scenes-pope", "generation": {"max_tokens": 4}}]},
            ["'tasks.0.generation.max_tokens'", "did you mean 'max_new_tokens'?"],
        ),
        ({"statistics": {"drws": 500}}, ["'statistics.drws'", "did you mean 'draws'?"]),
        ({"batch_size": 0}, ["batch_size", "greater than or equal to 1", "got 0"]),
        ({"batch_size": "many"}, ["batch_size", "got 'many'"]),
        ({"dtype": "float8"}, ["dtype", "'bfloat16'", "got 'float8'"]),
        ({"variants": {"baseline": ["var"]}}, ["'baseline' is the untouched model"]),
        ({"tasks": ["scenes-pope", "scenes-pope"]}, ["each task may be listed once"]),
        ({"tasks": []}, ["tasks", "at least 1 item"]),
        ({"name": "a/b"}, ["name", "got 'a/b'"]),
        (
            {"tasks": [{"name": "pope", "data": {"foldr": "x"}}]},
            ["'tasks.0.data.foldr'", "did you mean 'folder'?"],
        ),
        (
            {"tasks": [{"name": "pope", "data": {"folder": "x", "hub": "y"}}]},
            ["tasks.0.data", "folder (x) and hub (y) were both given"],
        ),
    ],
)
def test_errors_are_one_line_with_place_and_remedy(change: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.build({**MINIMAL, **change}, "r.yaml")
    message = str(caught.value)
    assert message.startswith("recipe r.yaml: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match="required key 'model' is missing"):
        recipes.build({"name": "r", "tasks": ["scenes-pope"]}, "r.yaml")


def test_methods_are_checked_with_the_variants_name() -> None:
    recipe = recipes.build({**MINIMAL, "variants": {"boost": ["varr"]}}, "r.yaml")
    with pytest.raises(MethodError, match=r"variant 'boost': unknown method 'varr'.*did you mean 'var'"):
        recipe.methods()


def test_two_variants_of_the_same_methods_are_refused() -> None:
    recipe = recipes.build({**MINIMAL, "variants": {"a": "var", "b": {"var": {"p": 0.6}}}}, "r.yaml")
    with pytest.raises(RecipeError, match="variants 'a' and 'b' are the same methods"):
        recipe.methods()


def test_overrides_reach_into_lists_by_name_and_number() -> None:
    data = {**MINIMAL, "tasks": ["scenes-pope", {"name": "scenes-vqa"}]}
    given = ["tasks.scenes-pope.limit=40", "tasks.1.generation.max_new_tokens=3", "batch_size=2", "variants.v=var"]
    recipe = recipes.build(recipes.apply_overrides(data, given), "r.yaml")
    assert recipe.tasks[0].limit == 40
    assert recipe.tasks[1].generation.max_new_tokens == 3
    assert recipe.batch_size == 2
    assert list(recipe.variants) == ["v"]
    assert data["tasks"] == ["scenes-pope", {"name": "scenes-vqa"}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size", "not of the form key.path=value"),
        ("=4", "not of the form"),
        ("tasks.scenes-popp.limit=4", "no entry 'scenes-popp'; did you mean 'scenes-pope'"),
        ("name.first=4", "has no keys"),
        ("name.first.second=4", "nothing to set below"),
        ("tasks.7.limit=4", "no entry '7'"),
        ("batch_size=[1", "not valid YAML"),
    ],
)
def test_bad_overrides_are_one_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        recipes.apply_overrides(MINIMAL, [override])


def test_an_override_is_typed_by_the_schema(tmp_path: Path) -> None:
    path = _file(tmp_path, yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError, match=r"batch_size.*got 'x'"):
        recipes.load(path, ["batch_size=x"])
    with pytest.raises(RecipeError, match="unknown key 'sed'; did you mean 'seed'"):
        recipes.load(path, ["sed=1"])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not valid YAML"), ("- a", "must be a mapping"), ("", "must be a mapping")]
)
def test_unreadable_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipes.load(_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        recipes.load("quickstat")


@pytest.mark.parametrize("name", list(recipes.shipped()))
def test_shipped_recipes_name_tasks_methods_and_metrics_that_exist(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name.rsplit("/", 1)[-1]
    assert recipe.description
    assert set(recipe.methods()) == {"baseline", *recipe.variants}
    tasks = {plan.name: open_task(plan) for plan in recipe.tasks}
    for plan in recipe.tasks:
        tasks[plan.name].check(plan.prompt, plan.parser)
    check_figures(recipe.paper, tasks)
    for paper in recipe.paper:
        assert paper.model == recipe.model, "figures that would never be compared"


def test_names_of_shipped_recipes_differ_so_that_run_folders_do() -> None:
    names = [recipes.load(name).name for name in recipes.shipped()]
    assert len(set(names)) == len(names)


def test_every_field_says_what_it_is() -> None:
    plain = {"description", "dtype", "tasks", "batch_size", "statistics", "name", "generation", "data"}
    for schema in (Recipe, TaskPlan, DataPlan, PaperFigures):
        undocumented = [name for name, field in schema.model_fields.items() if not field.description]
        assert set(undocumented) <= plain, schema.__name__
