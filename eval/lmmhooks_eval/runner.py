"""
A run: one loaded model, every task, the baseline and every variant over the same documents in the same batches.

Passes go task by task and variant by variant. The baseline's answers come from the model under the first variant's
*disabled* patch, the variants' from their own; before the first pass every patch is attached once, so that a method
that cannot run on this model says so before anything is computed, and a self-test shows that doing nothing changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmmhooks.errors import PromptError
from lmmhooks_eval import environment
from lmmhooks_eval.effect import Effect, answers_effect, dense_effect, patch_effect
from lmmhooks_eval.generate import Answer, BatchCost, Generator
from lmmhooks_eval.identity import ModelIdentity, answer_key, item_seed
from lmmhooks_eval.loading import load_model
from lmmhooks_eval.paper import check_figures
from lmmhooks_eval.plan import Item, batches, prepare, select
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.recipe import Recipe, TaskPlan, refuse_twins
from lmmhooks_eval.score import Tally
from lmmhooks_eval.selftest import self_test
from lmmhooks_eval.store import ENVIRONMENT, Record, RunFolder
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import open_task

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["Pass", "Runner", "run"]


def run(recipe: Recipe, out: Path, *, resume: bool = False, progress: RunProgress | None = None) -> list[str]:
    """
    Run a recipe into a folder.

    Parameters
    ----------
    recipe
        What to run.
    out
        The run folder.
    resume
        Continue the run that is there: answers present are skipped, failed documents are tried again.
    progress
        Told where the run is; silent if left out.

    Returns
    -------
    list of str
        One line for every document that failed; empty if all were answered.

    Raises
    ------
    LmmhooksError
        For bad input, before anything is asked.
    RunError
        If the run cannot go on; answers so far are on disk.
    """
    methods = recipe.methods()
    plans = [(plan, open_task(plan)) for plan in recipe.tasks]
    for plan, task in plans:
        task.check(plan.prompt, plan.parser)
    check_figures(recipe.paper, {task.name: task for _, task in plans})
    with RunFolder(out, recipe.expanded(), resume=resume) as folder:
        model, processor = load_model(recipe)
        runner = Runner(recipe, methods, model, processor, folder, progress or RunProgress())
        return runner.run(plans)


@dataclass(frozen=True)
class Pass:
    """One task under one variant: its documents in batches, and how they are asked."""

    plan: TaskPlan
    task: Task
    variant: str
    methods: tuple[Method, ...]
    generation: Mapping[str, Any]
    batches: Sequence[Sequence[Item]]


class Runner:
    """
    Carries out passes with one model and stores their answers.

    Parameters
    ----------
    recipe, methods
        What to run, and the methods of every variant.
    model, processor
        As loaded.
    folder
        Where answers go; what it holds already is skipped.
    progress
        Told where the run is.
    """

    def __init__(
        self,
        recipe: Recipe,
        methods: Mapping[str, tuple[Method, ...]],
        model: Any,
        processor: Any,
        folder: RunFolder,
        progress: RunProgress,
    ) -> None:
        self.recipe = recipe
        self.methods = dict(methods)
        self.model = model
        self.processor = processor
        self.folder = folder
        self.progress = progress
        self.generator = Generator(
            model, processor, recipe.processor, pad_to_square=recipe.pad_to_square, system=recipe.system
        )
        self.identity = ModelIdentity.of(
            recipe.model,
            model,
            processor,
            # Absent unless used, so that answers of runs without it keep their keys.
            settings={**recipe.processor, **({"pad_to_square": True} if recipe.pad_to_square else {})},
            system=recipe.system,
            quantization=recipe.quantization,
        )
        self.failures: dict[str, str] = {}
        self.memory_events: list[str] = []

    def run(self, plans: Sequence[tuple[TaskPlan, Task]]) -> list[str]:
        """Check, test, then every pass; returns one line per failed document."""
        for variant, methods in self.methods.items():
            if methods:
                # What a method measures on this checkpoint is measured once, here, and belongs to the identity of
                # answers.
                with self._wrap(methods) as patch:
                    self.methods[variant] = patch.methods
        refuse_twins(self.methods)  # again: what was measured may have made two of them equal
        prepared = [(plan, task, self._items(plan, task)) for plan, task in plans]
        record = environment.describe(
            self.model, asdict(self.identity), {task.name: asdict(task.source()) for _, task in plans}
        )
        record["methods"] = {
            variant: [{"id": method.id, "settings": method.settings()} for method in methods]
            for variant, methods in self.methods.items()
        }
        record["self_test"] = self._self_test(*prepared[0])
        self.folder.write_json(ENVIRONMENT, record)
        passes = [
            Pass(plan, task, variant, methods, self._generation(plan, task), self._batches(plan, task, items))
            for plan, task, items in prepared
            for variant, methods in self.methods.items()
        ]
        with self.progress:
            self.progress.begin(sum(len(items) for _, _, items in prepared) * len(self.methods))
            for plan, task, items in prepared:
                self._record_unaskable(plan, task, items)
            for each in passes:
                self.carry_out(each)
        record |= {"finished": environment.now(), "memory_events": self.memory_events}
        self.folder.write_json(ENVIRONMENT, record)
        return list(self.failures.values())

    # -- before the first answer ---------------------------------------------------------------------------------------

    def _items(self, plan: TaskPlan, task: Task) -> list[Item]:
        seed = self.recipe.seed if self.recipe.documents_seed is None else self.recipe.documents_seed
        docs = select(task, task.load(), plan.limit, seed)
        return [prepare(task, doc, self.processor, plan.prompt, self.recipe.system) for doc in docs]

    def _generation(self, plan: TaskPlan, task: Task) -> dict[str, Any]:
        return {**task.generation, **plan.generation.given()}

    def _batches(self, plan: TaskPlan, task: Task, items: Sequence[Item]) -> list[list[Item]]:
        # Sampling draws from one generator per call: only alone does a document get its own seed's draws.
        size = 1 if self._generation(plan, task).get("do_sample") else self.recipe.batch_size
        return batches([item for item in items if item.error is None], size)

    def _self_test(self, plan: TaskPlan, task: Task, items: Sequence[Item]) -> list[str]:
        chosen = [item for item in items if item.error is None][: self.recipe.self_test]
        if not chosen:
            return []
        greedy = {**self._generation(plan, task), "do_sample": False, "num_beams": 1}
        groups = batches(chosen, self.recipe.batch_size)

        def ask() -> list[tuple[int, ...]]:
            return [answer.tokens or () for group in groups for answer in self._ask(task, group, greedy)[0]]

        order = [item.doc_id for group in groups for item in group]
        return self_test(ask, self._wrap, [methods for methods in self.methods.values() if methods], order)

    # -- passes --------------------------------------------------------------------------------------------------------

    def carry_out(self, each: Pass) -> None:
        """Ask what is not answered yet, batch by batch, and store every batch before the next begins."""
        tally = Tally(each.task)
        self.progress.enter(each.task.name, each.variant)
        with self._attached(each.methods) as patch:
            for index, batch in enumerate(each.batches):
                keys = {item.doc_id: self._key(each, item) for item in batch}
                missing = [item for item in batch if keys[item.doc_id] not in self.folder.answered]
                records = []
                for part in self._fitting(each, missing, patch):
                    records += self._records(each, part, keys, index, patch)
                self.folder.append(records)
                for record in records:
                    if "error" not in record:
                        tally.add(record["score"])
                self.progress.advance(len(batch), tally.text())
        self.progress.leave(each.task.name, each.variant, tally.text())

    def _fitting(self, each: Pass, items: Sequence[Item], patch: Any) -> Iterator[_Part]:
        """Ask the items together; where that fails for lack of memory or for one bad prompt, in halves."""
        if not items:
            return
        try:
            answers, cost = self._ask(each.task, items, each.generation, patch)
        except (RuntimeError, PromptError) as error:
            failure = self._judged(error, len(items))
        else:
            yield _Part(items, answers, cost, None)
            return
        # Outside the handler: the exception's frames would keep the tensors that did not fit alive.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(items) == 1:
            yield _Part(items, [], None, failure)
            return
        half = (len(items) + 1) // 2
        for part in (items[:half], items[half:]):
            yield from self._fitting(each, part, patch)

    def _judged(self, error: Exception, size: int) -> str:
        """One line for a failure that smaller batches may cure; anything else goes up."""
        line = " ".join(str(error).split())
        if isinstance(error, PromptError):
            return line
        if not _is_out_of_memory(error):
            raise error
        if size > 1:
            note = f"out of memory with a batch of {size}; continuing in halves"
            self.memory_events.append(note)
            self.progress.note(note)
        return f"out of memory with a batch of one: {line[:200]}"

    def _ask(
        self, task: Task, items: Sequence[Item], generation: Mapping[str, Any], patch: Any = None
    ) -> tuple[list[Answer], BatchCost]:
        images = [task.images(item.doc) for item in items]
        seeds = [item_seed(self.recipe.seed, item.doc_id) for item in items]
        if patch is not None and patch.puts_answers_together:
            questions = [item.question for item in items]
            # A method that looks for itself is not told where to look: what it finds is what is judged.
            told = task.region if any(getattr(method, "needs_region", False) for method in patch.methods) else None
            regions = None if told is None else [told(item.doc) for item in items]
            return self.generator.put_together(patch, questions, images, generation, seeds, regions)
        prompts = [item.prompt for item in items]
        return self.generator.ask(prompts, images, generation, seeds[0], task.answer_words)

    # -- records -------------------------------------------------------------------------------------------------------

    def _key(self, each: Pass, item: Item) -> str:
        random = bool(each.methods) or bool(each.generation.get("do_sample"))
        return answer_key(
            self.identity,
            each.methods,
            task=each.task.name,
            doc_id=item.doc_id,
            prompt=item.prompt,
            image=item.image,
            generation=each.generation,
            seed=self.recipe.seed if random else None,
        )

    def _records(self, each: Pass, part: _Part, keys: Mapping[str, str], index: int, patch: Any) -> list[Record]:
        if part.error is not None or part.cost is None:
            item = part.items[0]
            return [self._failed(each.task, each.variant, item, keys[item.doc_id], part.error or "no answer")]
        shared = {"batch": index, **{f"batch_{name}": _short(value) for name, value in asdict(part.cost).items()}}
        effect = self._effect(each, part, patch)
        shared |= effect.batch
        records = []
        for row, (item, answer) in enumerate(zip(part.items, part.answers, strict=True)):
            parsed = each.task.parse(answer.text, item.doc, each.plan.parser)
            records.append(
                {
                    **_head(each.task, each.variant, item, keys[item.doc_id]),
                    "text": answer.text,
                    "parsed": parsed.value,
                    "clean": parsed.clean,
                    "score": dict(each.task.score(parsed.value, item.doc)),
                    "prompt_tokens": answer.prompt_tokens,
                    "visual_tokens": answer.visual_tokens,
                    "new_tokens": answer.new_tokens,
                    "stop_reason": answer.stop_reason,
                    **_told(answer, each.methods),
                    "visual_kept": effect.visual_kept[row],
                    **shared,
                }
            )
        return records

    def _effect(self, each: Pass, part: _Part, patch: Any) -> Effect:
        if not each.methods:
            rows = [(answer.prompt_tokens, answer.visual_tokens) for answer in part.answers]
            return dense_effect(self.model.config, rows)
        costs = [answer.cost for answer in part.answers if answer.cost is not None]
        return answers_effect(costs) if costs else patch_effect(patch)

    def _record_unaskable(self, plan: TaskPlan, task: Task, items: Sequence[Item]) -> None:
        for item in items:
            if item.error is None:
                continue
            for variant, methods in self.methods.items():
                each = Pass(plan, task, variant, methods, self._generation(plan, task), ())
                self.folder.append([self._failed(task, variant, item, self._key(each, item), item.error)])
            self.progress.advance(len(self.methods))

    def _failed(self, task: Task, variant: str, item: Item, key: str, reason: str) -> Record:
        self.failures.setdefault(f"{task.name}/{item.doc_id}", reason)
        return {**_head(task, variant, item, key), "error": reason}

    # -- patches -------------------------------------------------------------------------------------------------------

    def _wrap(self, methods: tuple[Method, ...]) -> Any:
        import lmmhooks

        return lmmhooks.wrap(self.model, *methods, processor=self.processor)

    @contextmanager
    def _attached(self, methods: tuple[Method, ...]) -> Iterator[Any]:
        """
        The patch of a variant; for the baseline the first variant's, disabled, so that both went through the same
        door.
        """
        carrier = methods or next((other for other in self.methods.values() if other), ())
        with ExitStack() as stack:
            patch = stack.enter_context(self._wrap(carrier)) if carrier else None
            if patch is not None and not methods:
                stack.enter_context(patch.disabled())
            yield patch


@dataclass(frozen=True)
class _Part:
    """Items that were asked together: their answers and cost, or why there are none."""

    items: Sequence[Item]
    answers: list[Answer]
    cost: BatchCost | None
    error: str | None


def _head(task: Task, variant: str, item: Item, key: str) -> Record:
    return {
        "key": key,
        "task": task.name,
        "variant": variant,
        "doc_id": item.doc_id,
        "cluster": item.cluster,
        "doc": dict(item.doc),
        "prompt": item.prompt,
        "image": item.image,
    }


def _told(answer: Answer, methods: tuple[Method, ...]) -> Record:
    """What is known of some answers only: their tokens, how sure the model was, or how many generations they took."""
    told: Record = {}
    if answer.cost is not None:
        told["passes"] = answer.cost.passes
    if answer.tokens is not None:
        told["tokens"] = list(answer.tokens)
    if answer.margin is not None:
        told["margin"] = answer.margin
    if answer.gaps is not None and not methods:
        # Of the model as it is: under a method the scores are no longer those that a cut is applied to.
        told["gaps"] = answer.gaps
    return told


def _short(value: Any) -> Any:
    """Times to the microsecond: more digits are noise that fills the file."""
    return round(value, 3) if isinstance(value, float) else value


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
