"""Recipes that reproduce papers: each has an offline twin, and every method runs on a trained model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BlipConfig, CLIPConfig

import lmmhooks
from lmmhooks.bench.shapes import build_config
from lmmhooks.methods.decoding.answering import AnswerMethod
from lmmhooks_eval import recipes
from lmmhooks_eval import runner as runner_module
from lmmhooks_eval.loading import load_model
from lmmhooks_eval.recipe import BASELINE, Recipe
from lmmhooks_eval.runner import run
from lmmhooks_eval.score import score_run
from lmmhooks_eval.store import read_samples
from lmmhooks_eval.sweep import split_name
from tests.conformance.table import ROWS

TWINS = {"chair": "scenes-caption", "pope": "scenes-pope"}
#: The bundled model that stands in for a checkpoint, and visual tokens per image of the checkpoint.
MODELS = {"llava-1.5-7b": ("tiny-llava", 576), "qwen2.5-vl-3b": ("tiny-qwen", None)}
SMALL_TOKENS = 64
#: Architectures of the checkpoints.
SHAPES_OF = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b-shape",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava-next-7b-shape",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2.5-vl-3b-shape",
}
REPRODUCE = [name for name in recipes.shipped() if name.startswith("reproduce/") and "/offline/" not in name]
OFFLINE = [name for name in recipes.shipped() if "/offline/" in name]
SCENES = ("attention-scenes-llava", "attention-scenes-qwen")
SWEEPS = {"reduction-sweep": "llava", "reduction-sweep-qwen": "qwen2_5_vl"}
#: What a twin may set otherwise: sink channels, text towers and matching models belong to a checkpoint, layers and
#: windows scale with depth and grid, four pivots of each kind would be most of seven tokens, and ranks do not grow with
#: the image.
DIFFERS = {
    *("sink_dims", "clip", "layer", "layers", "read_layers", "window", "pivots", "text_pivots", "scale", "bias"),
    *("matcher", "relevance"),
    *("keep", "budget", "second", "num_top", "num_keep", "topk"),
}
COUNTS = ("keep", "budget", "second", "num_top", "num_keep", "topk")
#: What a twin generates as the recipe of the paper does; the longest answer is the task's own.
MODES = {"do_sample", "temperature", "top_p", "top_k", "num_beams"}
CONTROLS = ("decoding-controls", "decoding-controls-qwen")
CONTROLS_SAMPLING = ("decoding-controls-sampling", "decoding-controls-sampling-qwen")
BEAMS = "decoding-controls-beams"
REFINEMENT = {"refinement": "llava", "refinement-qwen": "qwen2_5_vl"}
#: Reducers and decoding methods whose twins are run in full by the tests: one of every engine and kind of branch.
RUN = ("visionzip", "tome", "sparsevlm", "yopo", "look-m", "tvc", "vcd", "icd", "sid", "deco", "opera", "olm")


def methods_of_kind(kind: str) -> set[str]:
    return {name for name, cls in lmmhooks.methods().items() if cls.kind == kind and "identity" not in name}


def of_papers() -> list[str]:
    """Recipes with figures of a method; LLaVA's own baseline has none."""
    return [name for name in REPRODUCE if recipes.load(name).variants]


def parts(name: str) -> tuple[str, str, str]:
    """What is run (a method, and its mode if it has several recipes), checkpoint and task, as a recipe's name says."""
    found = re.fullmatch(r"reproduce/(.+)-(llava-1\.5-7b|llava-next-7b|qwen2\.5-vl-3b)-(\w+)", name)
    assert found is not None, f"{name} names no known checkpoint"
    label, model, task = found.groups()
    return label, model, task


def share(amount: Any, tokens: int | None) -> float | None:
    """Counts as shares of an image's tokens."""
    return amount / tokens if isinstance(amount, int) and tokens is not None else amount


@pytest.mark.parametrize("name", of_papers())
def test_every_recipe_of_a_paper_has_an_offline_twin(name: str) -> None:
    recipe = recipes.load(name)
    (plan,) = recipe.tasks
    label, model, task = parts(name)
    method = re.sub("-(greedy|sampling)$", "", label)
    assert task == plan.name
    small_model, tokens = MODELS.get(model, MODELS["llava-1.5-7b"])
    twin = recipes.load(f"reproduce/offline/{label}-{small_model}-{TWINS[plan.name]}")
    assert [each.name for each in twin.tasks] == [TWINS[plan.name]]
    assert twin.model == small_model
    ours, theirs = twin.methods(), recipe.methods()
    assert {built.id for methods in (ours, theirs) for each in methods.values() for built in each} == {method}
    if model not in MODELS:
        # LLaVA-NeXT's crops are LLaVA-1.5's images: what is settled per crop has its twin there.
        return
    assert list(twin.variants) == list(recipe.variants)
    for variant in recipe.variants:
        (small,), (full,) = ours[variant], theirs[variant]
        differing = {key for key, value in small.settings().items() if value != full.settings()[key]}
        assert differing <= DIFFERS
        for count in differing.intersection(COUNTS):
            # Half a token by rounding; two where the first cut, one layer in eight, spends more than the share.
            scaled = share(full.settings()[count], tokens), share(small.settings()[count], SMALL_TOKENS)
            assert scaled[1] == pytest.approx(scaled[0], abs=2 / SMALL_TOKENS), (variant, count)
    generation = {key: value for key, value in plan.generation.given().items() if key in MODES}
    assert {key: value for key, value in twin.tasks[0].generation.given().items() if key in MODES} == generation


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
    stated = any("baseline is not known" in paper.notes for paper in recipe.paper)
    assert ("baseline" in figures) != stated, "gains need a baseline; where a source has none, its notes say so"
    for paper in recipe.paper:
        assert "arXiv" in paper.source, "a source that can be looked up"


@pytest.mark.parametrize("name", SCENES)
def test_the_scenes_recipes_hold_every_attention_method(name: str) -> None:
    methods = recipes.load(name).methods()
    assert {method.id for built in methods.values() for method in built} == methods_of_kind("attention")


def test_every_reducer_has_an_offline_recipe() -> None:
    built = [method for name in OFFLINE for each in recipes.load(name).methods().values() for method in each]
    assert {method.id for method in built if method.kind == "reduction"} == methods_of_kind("reduction")


def of_kind_decoding(name: str) -> set[str]:
    methods = recipes.load(name).methods()
    return {method.id for built in methods.values() for method in built if method.kind == "decoding"}


def generated() -> set[str]:
    """Decoding methods and controls that act through generate."""
    return {name for name in methods_of_kind("decoding") if not issubclass(lmmhooks.methods()[name], AnswerMethod)}


def test_every_decoding_method_and_control_has_an_offline_recipe() -> None:
    assert set().union(*(of_kind_decoding(name) for name in OFFLINE)) == generated()


@pytest.mark.parametrize("name", [*CONTROLS, *CONTROLS_SAMPLING])
def test_the_controls_recipes_hold_every_decoding_method(name: str) -> None:
    recipe = recipes.load(name)
    searching = {method for method in generated() if ROWS[method].modes}
    # Those that put answers together draw their own tokens, and are run once, beside the greedy ones.
    together = set() if name in CONTROLS_SAMPLING else methods_of_kind("decoding") - generated()
    assert of_kind_decoding(name) == (generated() - searching) | together
    assert of_kind_decoding(BEAMS) >= searching
    sampled = {bool(plan.generation.do_sample) for plan in recipe.tasks}
    assert sampled == {name in CONTROLS_SAMPLING}


@pytest.mark.parametrize("name", CONTROLS_SAMPLING)
def test_every_published_cut_is_sampled_alone(name: str) -> None:
    """A method's gain under sampling means something beside that of its own cut."""
    built = [method for methods in recipes.load(name).methods().values() for method in methods]
    alone = {method.beta for method in built if method.id == "apc-only"}
    # Controls take the cut of the method they name; those of revisit and inter keep next to everything.
    cuts = {method.beta for method in built if method.paper != "none; control" and method.beta >= 0.05}
    assert cuts <= alone


@pytest.mark.parametrize("name", SWEEPS)
def test_the_sweeps_hold_every_reducer_that_serves_their_model(name: str) -> None:
    methods = recipes.load(name).methods()
    serving = {method for method in methods_of_kind("reduction") if SWEEPS[name] not in ROWS[method].refused}
    assert {method.id for built in methods.values() for method in built} == serving


@pytest.mark.parametrize("name", REFINEMENT)
def test_the_refinement_recipes_hold_every_method_that_serves_their_model(name: str) -> None:
    methods = recipes.load(name).methods()
    # A CLIP to look with would have to be downloaded.
    serving = methods_of_kind("refinement") - {"api-clip"}
    serving = {method for method in serving if REFINEMENT[name] not in ROWS[method].refused}
    assert {method.id for built in methods.values() for method in built} == serving


@pytest.mark.parametrize("name", SWEEPS)
def test_swept_shares_are_what_methods_are_given(name: str) -> None:
    """A sweep may set keep only where that is the mean over layers: one cut, before the decoder."""
    recipe = recipes.load(name)
    assert recipe.sweep is not None
    methods = recipe.methods()
    with_budget = 0
    for variant, (method,) in ((key, built) for key, built in methods.items() if split_name(key) is not None):
        _, budget = split_name(variant) or ("", 0.0)
        assert (method.keep if method.budget is None else method.budget) == budget
        with_budget += method.budget is not None
        assert method.budget is not None or method.id in ("tome", "evit", "flowcut")
    assert with_budget > 0


@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen"])
def test_every_variant_fits_the_model_of_its_recipe(model: str) -> None:
    shipped = [recipes.load(name) for name in (*OFFLINE, *SWEEPS, *CONTROLS, *CONTROLS_SAMPLING, BEAMS, *REFINEMENT)]
    here = [recipe for recipe in shipped if recipe.model == model]
    assert here
    patched, processor = load_model(here[0])
    for recipe in here:
        _refuse_misfits(recipe, patched, processor)


@pytest.mark.parametrize("checkpoint", SHAPES_OF)
def test_every_variant_fits_the_checkpoint_of_its_paper(
    checkpoint: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Layers, counts and budgets are possible there; without weights, which checks of settings do not look at, and with
    another model's tokenizer, of which they ask only that there is one.
    """
    tower = {"hidden_size": 1024, "num_attention_heads": 16}
    CLIPConfig(vision_config=tower).save_pretrained(tmp_path / "clip-vit-large-patch14-336")
    BlipConfig().save_pretrained(tmp_path / "blip-itm-large-coco")
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(SHAPES_OF[checkpoint])).eval()
    here = [recipe for recipe in map(recipes.load, of_papers()) if recipe.model == checkpoint]
    assert here
    for recipe in here:
        _refuse_misfits(recipe, model, loaded[1])


def _refuse_misfits(recipe: Recipe, model: Any, processor: Any) -> None:
    for variant, built in recipe.methods().items():
        if variant == BASELINE:
            continue
        try:
            with lmmhooks.wrap(model, *built, processor=processor):
                pass
        except lmmhooks.LmmhooksError as error:
            pytest.fail(f"{recipe.name}, {variant}: {error}")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(recipes.load("attention-scenes-llava"))


def _small(recipe: Recipe) -> Recipe:
    """The recipe on a handful of documents with short answers."""
    changes = []
    for plan in recipe.tasks:
        shorter = plan.generation.model_copy(update={"max_new_tokens": 10})
        changes.append(plan.model_copy(update={"limit": 6, "generation": shorter}))
    statistics = recipe.statistics.model_copy(update={"draws": 100})
    return recipe.model_copy(
        update={"tasks": changes, "self_test": 1, "statistics": statistics, "max_unparsed": 1.0, "batch_size": 6}
    )


def _runs(name: str) -> bool:
    """Twins of attention methods on tiny-llava, and of a few reducers and decoding methods."""
    recipe = recipes.load(name)
    found = {method.id for built in recipe.methods().values() for method in built}
    return recipe.model == "tiny-llava" and found <= {*methods_of_kind("attention"), *RUN}


@pytest.mark.parametrize("name", [name for name in OFFLINE if _runs(name)])
def test_offline_twins_run(name: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "load_model", lambda recipe: loaded)
    recipe = _small(recipes.load(name))
    assert run(recipe, tmp_path / "run") == []
    scored = score_run(tmp_path / "run")
    assert scored["problems"] == []
    (task,) = scored["tasks"].values()
    assert list(task["variants"]) == ["baseline", *recipe.variants]


def test_controls_that_know_nothing_new_answer_as_the_model_does(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under greedy decoding neither a cut nor a scale nor branches that show the original may change an answer."""
    monkeypatch.setattr(runner_module, "load_model", lambda recipe: loaded)
    recipe = _small(recipes.load("decoding-controls"))
    silent = ("apc-only", "temperature", "equal-branch")
    kept = {name: specs for name, specs in recipe.variants.items() if name in (*silent, "sign-flip-vcd", "yes-minus-1")}
    assert run(recipe.model_copy(update={"variants": kept}), tmp_path / "run") == []
    answers: dict[str, list[str]] = {}
    for record in read_samples(tmp_path / "run"):
        answers.setdefault(record["variant"], []).append(record["text"])
    assert all(answers[name] == answers[BASELINE] for name in silent)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoding-controls", "decoding-controls-sampling", BEAMS])
def test_every_decoding_method_runs_on_the_trained_model(
    name: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "load_model", lambda recipe: loaded)
    recipe = _small(recipes.load(name))
    assert run(recipe, tmp_path / "run") == []
    scored = score_run(tmp_path / "run")
    assert scored["problems"] == []
    for task in scored["tasks"].values():
        assert set(task["variants"]) == {"baseline", *recipe.variants}
        assert all(figures["n"] > 0 for figures in task["variants"].values())


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
