"""Wrapping a model and unwrapping it: the one place through which anything is attached or detached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lmmhooks.engines.calibration import fill_measured
from lmmhooks.engines.composition import check_composition
from lmmhooks.engines.runtime import Runtime, find_runtime
from lmmhooks.errors import MethodError
from lmmhooks.family import Family
from lmmhooks.family import resolve as resolve_family
from lmmhooks.methods.base import Method
from lmmhooks.methods.registry import resolve as resolve_method
from lmmhooks.prompting import Prompter, answer
from lmmhooks.stats import Stats

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from lmmhooks.engines.answering import AnswerCost

__all__ = ["Patch", "unwrap", "wrap"]


class Patch:
    """
    Methods attached to a model by one call of :func:`wrap`.

    Attributes
    ----------
    model
        The wrapped model; use it as before.
    family
        What was resolved about it.
    methods
        The methods with every setting filled in.

    A patch is also a context manager that removes itself at the end, after an exception too.
    """

    def __init__(self, runtime: Runtime, methods: tuple[Method, ...], processor: Any) -> None:
        self._runtime = runtime
        self.methods = methods
        self.processor = processor
        self._disabled = 0
        self._removed = False

    @property
    def model(self) -> nn.Module:
        return self._runtime.family.model

    @property
    def family(self) -> Family:
        return self._runtime.family

    @property
    def enabled(self) -> bool:
        """Whether the methods act now: neither removed nor inside :meth:`disabled`."""
        return not (self._removed or self._disabled)

    @property
    def attached(self) -> list[str]:
        """What is attached to the model at the moment, for all its patches: hooks, attributes, configuration values."""
        return list(self._runtime.attachments.described)

    @property
    def stats(self) -> Stats:
        """
        What the newest prompt cost and what was changed; see :class:`~lmmhooks.stats.Stats`.

        Raises
        ------
        MethodError
            If the model has not run since it was wrapped or re-enabled.
        """
        return Stats.of(self._runtime.family, self._runtime.last_state)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The model without this patch, bit-identical; other patches stay. May be nested."""
        self._disabled += 1
        if self._disabled == 1:
            self._runtime.refresh()
        try:
            yield self.model
        finally:
            self._disabled -= 1
            if not self._disabled:
                self._runtime.refresh()

    def remove(self) -> None:
        """Detach everything this patch attached, leaving no trace. Idempotent; patches go in any order."""
        if not self._removed:
            self._removed = True
            self._runtime.patches.remove(self)
            self._runtime.refresh()

    @property
    def puts_answers_together(self) -> bool:
        """Whether a method makes one answer of several generations: then `answer` works, ``model.generate`` not."""
        return self._runtime.answering is not None

    @property
    def answer_cost(self) -> AnswerCost:
        """
        What the newest call of :meth:`answer` took; see :class:`~lmmhooks.engines.answering.AnswerCost`.

        Raises
        ------
        MethodError
            If no method puts answers together: `stats` says what the newest prompt cost.
        """
        if (engine := self._runtime.answering) is None:
            raise MethodError("no method of this model puts answers together; patch.stats says what a prompt cost")
        return engine.cost

    def answer(self, image: Any, prompt: str, *, prompter: Prompter | None = None, **generate_kwargs: Any) -> str:
        """
        Answer a question about an image; a method that asks several times for one answer acts here alone.

        Parameters
        ----------
        image
            A PIL image, a path, or a sequence of them; None for a prompt without image.
        prompt
            The question as plain text; the chat template of the processor is applied.
        prompter
            How questions are written and images shown: system message, image settings. None: as the processor does.
        **generate_kwargs
            Passed to ``model.generate``.

        Returns
        -------
        str
            The new text, stripped.

        Raises
        ------
        PromptError
            Empty prompt, an image that cannot be read, or no processor known.
        """
        prompter = Prompter(self.processor) if prompter is None else prompter
        if (engine := self._runtime.answering) is not None:
            return engine.answer(prompter, image, prompt, **generate_kwargs)
        return answer(self.model, self.processor, image, prompt, prompter=prompter, **generate_kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else "disabled" if self._disabled else "active"
        return f"Patch({', '.join(method.spec() for method in self.methods)}; {state})"


def wrap(model: nn.Module, *methods: str | Mapping[str, Any] | Method, processor: Any = None) -> Patch:
    """
    Attach methods to a loaded model; its own ``generate`` and ``forward`` go on working.

    Parameters
    ----------
    model
        A transformers image-text-to-text model, on any device, in any dtype and attention backend.
    *methods
        Names (``"var"``), specifications (``"fastervlm(keep=128)"``), or Method objects. Order matters where several
        act at the same place. Patches made by several calls compose like methods of one.
    processor
        The model's processor; needed by :meth:`Patch.answer` and by methods that process the image again.

    Returns
    -------
    Patch
        Already active.

    Raises
    ------
    MethodError
        Unknown method or setting, no method at all, or methods that contradict each other or the model.
    ModelError
        A model that lacks what is needed.

    Examples
    --------
    >>> with lmmhooks.wrap(model, "var", lmmhooks.method("fastervlm", keep=128)):
    ...     model.generate(**inputs)
    """
    if not methods:
        raise MethodError("wrap needs at least one method, such as wrap(model, 'var'); `lmmhooks methods` lists them")
    wanted = [resolve_method(method) for method in methods]
    runtime = find_runtime(model) or Runtime(resolve_family(model))
    bound = tuple(_prepare(method, runtime, processor) for method in wanted)
    check_composition(runtime.family, [m for patch in runtime.patches for m in patch.methods], bound)
    patch = Patch(runtime, bound, processor)
    runtime.patches.append(patch)
    try:
        runtime.refresh()
    except BaseException:
        patch.remove()
        raise
    return patch


def unwrap(model: nn.Module) -> None:
    """Remove every patch of a model; does nothing when there is none."""
    runtime = find_runtime(model)
    for patch in list(runtime.patches) if runtime else ():
        patch.remove()


def _prepare(method: Method, runtime: Runtime, processor: Any) -> Method:
    """The method with settings filled in that depend on the model: published, derived, or measured on it."""
    family = runtime.family
    method.check(family)
    published = {k: v for k, v in method.defaults_for(family).items() if getattr(method, k) is None}
    bound = replace(method, **published).bind(family)
    if bound.is_identity:
        return bound
    filled = fill_measured(bound, runtime, processor)
    if filled is not bound:
        filled.check(family)
    return filled
