"""
Recipes: what to run, as a checked YAML document.

A recipe holds a model, tasks and variants; the untouched model is always there as the variant ``baseline``. Every key
is known, every value is typed, every method is built once while the recipe is read, so a typo costs a second and not
an hour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.paper import PaperFigures
from lmmhooks_eval.sweep import SweepPlan

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["BASELINE", "DataPlan", "GenerationOverrides", "Recipe", "StatisticsSettings", "TaskPlan", "refuse_twins"]

BASELINE = "baseline"
"""Name of the variant that every recipe has without listing it: the model as it is."""

MethodSpec = str | dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenerationOverrides(_Strict):
    """Arguments of ``generate`` that replace what the task prescribes; unset ones are left to the task."""

    max_new_tokens: int | None = Field(default=None, ge=1, description="Longest answer, in tokens.")
    do_sample: bool | None = Field(default=None, description="Sample instead of taking the most likely token.")
    temperature: float | None = Field(default=None, gt=0, description="Softmax temperature when sampling.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus size when sampling.")
    top_k: int | None = Field(default=None, ge=0, description="Number of candidates when sampling; 0 for all.")
    num_beams: int | None = Field(default=None, ge=1, description="Beams; 1 is no beam search.")
    repetition_penalty: float | None = Field(default=None, gt=0, description="1 is no penalty.")

    def given(self) -> dict[str, Any]:
        """The arguments that are set."""
        return self.model_dump(exclude_none=True)


class DataPlan(_Strict):
    """Where a task's documents come from, for tasks whose data are not bundled; unset: the hub dataset of the task."""

    folder: str | None = Field(
        default=None, description="Folder with the benchmark's own files, for machines without a network."
    )
    files: dict[str, str] = Field(
        default_factory=dict, description="Names of files inside the folder where they differ from the official ones."
    )
    hub: str | None = Field(default=None, description="Dataset id, or a folder that mirrors a dataset repository.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub dataset.")
    ids: str | None = Field(
        default=None, description="Text file with the ids of the documents to ask, one per line; unset: all."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataPlan:
        if self.folder is not None and self.hub is not None:
            raise ValueError(f"folder ({self.folder}) and hub ({self.hub}) were both given; keep one of them")
        return self


class TaskPlan(_Strict):
    """One task of a recipe: how much of it, in which wording, read how."""

    name: str = Field(description="Name of a task; `lmmhooks tasks` lists them.")
    limit: int | None = Field(
        default=None, ge=1, description="About this many documents, stratified, whole clusters; unset: all."
    )
    prompt: str | None = Field(default=None, description="Named wording; unset: the task's first.")
    parser: str | None = Field(default=None, description="Named reading of answers; unset: the task's first.")
    generation: GenerationOverrides = GenerationOverrides()
    data: DataPlan = DataPlan()


class StatisticsSettings(_Strict):
    """How differences are judged."""

    draws: int = Field(default=10_000, ge=100, le=1_000_000, description="Bootstrap resamples.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Coverage of every interval.")
    seed: int = Field(default=0, ge=0, description="Seed of the resampling.")
    mid_p: bool = Field(default=False, description="Mid-p variant of McNemar's test.")


def _as_plan(value: Any) -> Any:
    """A bare task name is a task with nothing changed."""
    return {"name": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    """A single method, or a single paper, needs no list around it."""
    return [value] if isinstance(value, (str, Mapping)) else value


class Recipe(_Strict):
    """
    Everything that determines a run.

    The fields are documented in their descriptions; `lmmhooks recipes NAME` shows the shipped ones. Seeds: with
    sampling, every document has its own, derived from `seed` and the document's id, so order and batches do not matter.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run folder.")
    description: str = ""
    model: str = Field(min_length=1, description="A bundled model, a hub id or a folder.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attn_implementation: str | None = Field(
        default=None, description="sdpa, eager, flash_attention_2, ...; unset: the model's."
    )
    device_map: str | dict[str, int | str] | None = Field(
        default=None, description="auto, cuda:0, cpu or a map; unset: cpu or GPU."
    )
    quantization: Literal["bnb-4bit", "bnb-8bit"] | None = Field(
        default=None, description="Weights through bitsandbytes."
    )
    system: str | None = Field(default=None, description="System message put before every prompt.")
    processor: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Settings of the image processor, e.g. do_pad, min_pixels, max_pixels."
    )
    pad_to_square: bool = Field(
        default=False,
        description="Pad images to a square with the image processor's mean colour first, as LLaVA-1.5's own pipeline "
        "does; its Hugging Face processor crops the centre instead.",
    )
    tasks: list[Annotated[TaskPlan, BeforeValidator(_as_plan)]] = Field(min_length=1)
    variants: dict[str, Annotated[list[MethodSpec], BeforeValidator(_as_list), Field(min_length=1)]] = Field(
        default_factory=dict, description="Name -> methods applied together, in this order."
    )
    sweep: SweepPlan | None = Field(
        default=None, description="Methods at several budgets; stands for variants named method@percent."
    )
    batch_size: int = Field(default=8, ge=1, le=4096)
    seed: int = Field(default=0, ge=0, description="Seed of sampling and of limited samples.")
    documents_seed: int | None = Field(
        default=None, ge=0, description="Seed of limited samples alone, to sample answers anew; unset: `seed`."
    )
    self_test: int = Field(
        default=8, ge=0, description="Documents on which a patch that does nothing must change nothing; 0: skip."
    )
    max_unparsed: float = Field(
        default=0.5, ge=0, le=1, description="A larger share of unparsed answers fails the run."
    )
    statistics: StatisticsSettings = StatisticsSettings()
    paper: Annotated[list[PaperFigures], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Figures a paper prints for these tasks and variants, one block per source."
    )

    @model_validator(mode="before")
    @classmethod
    def _swept(cls, data: Any) -> Any:
        """Variants of the sweep written out; a recipe that was expanded already names them all."""
        if not isinstance(data, Mapping) or data.get("sweep") is None:
            return data
        given = data.get("variants") or {}
        swept = SweepPlan.model_validate(data["sweep"]).variants()
        return {**data, "variants": {**given, **{name: specs for name, specs in swept.items() if name not in given}}}

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: list[TaskPlan]) -> list[TaskPlan]:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"each task may be listed once, got {', '.join(names)}")
        return tasks

    @field_validator("variants")
    @classmethod
    def _baseline_is_implicit(cls, variants: dict[str, list[MethodSpec]]) -> dict[str, list[MethodSpec]]:
        if BASELINE in variants:
            raise ValueError(f"{BASELINE!r} is the untouched model and always there; give this variant another name")
        return variants

    @model_validator(mode="after")
    def _papers_speak_of_this_recipe(self) -> Recipe:
        for paper in self.paper:
            paper.refuse_unknown([task.name for task in self.tasks], self.variants)
        return self

    def methods(self) -> dict[str, tuple[Method, ...]]:
        """
        The methods of every variant, built and checked; the baseline comes first and has none.

        Raises
        ------
        MethodError
            For an unknown method or a setting that is not allowed; the message names the variant.
        RecipeError
            If two variants are the same.
        """
        from lmmhooks.errors import MethodError
        from lmmhooks.methods import resolve

        built: dict[str, tuple[Method, ...]] = {BASELINE: ()}
        for name, specs in self.variants.items():
            try:
                built[name] = tuple(resolve(spec) for spec in specs)
            except MethodError as error:
                raise MethodError(f"variant {name!r}: {error}") from error
        refuse_twins(built)
        return built

    def expanded(self) -> dict[str, Any]:
        """The recipe as plain data with every default and every hyper-parameter written out; itself a valid recipe."""
        data = self.model_dump(mode="json")
        data["variants"] = {
            name: [{method.id: method.settings()} for method in methods]
            for name, methods in self.methods().items()
            if methods
        }
        return data


def refuse_twins(methods: Mapping[str, tuple[Method, ...]]) -> None:
    """
    Raise `RecipeError` if two variants are the same methods with the same settings.

    An answer belongs to its methods, not to the name of a variant: of two that are the same, one would stay empty.
    """
    names: dict[str, str] = {}
    for name, built in methods.items():
        settings = repr([(method.id, method.settings()) for method in built])
        if settings in names:
            raise RecipeError(
                f"variants {names[settings]!r} and {name!r} are the same methods with the same settings; drop one"
            )
        names[settings] = name
