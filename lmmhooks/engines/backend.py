"""
The attention function lmmhooks puts in front of a model's own, through transformers' ``AttentionInterface``.

One stable name per base backend (``lmmhooks_sdpa`` ...) is registered the first time it is needed, together with the
mask function of its base; without the latter transformers would build no mask and padding would be attended to. What
happens inside is decided per attention module by the :class:`Port` hooked onto it; modules without one go straight to
the base function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lmmhooks.engines.attach import Attachments
from lmmhooks.errors import ModelError

__all__ = ["AttentionCall", "Port", "base_name", "route"]

PREFIX = "lmmhooks_"

AttentionResult = tuple[Tensor, Tensor | None]


class BaseAttention(Protocol):
    """The model's own attention function with module and extra arguments bound."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> AttentionResult: ...


@dataclass(frozen=True)
class AttentionCall:
    """
    One call of an attention function.

    Attributes
    ----------
    query, key, value
        ``[B, H, Nq, d]`` and ``[B, Hkv, Nk, d]``, after rotary embedding and cache update.
    mask
        Whatever the backend's mask function made: dense, 2-D, a block mask or None.
    kwargs
        The remaining arguments.
    base
        The model's own function; see `run_base`.
    backend
        Its name, such as ``"sdpa"``.
    whole
        Answers the call as it stands in the place of the model's own function; None where nobody does.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    kwargs: dict[str, Any]
    base: BaseAttention
    backend: str
    whole: Callable[[AttentionCall], AttentionResult] | None = None

    @property
    def scaling(self) -> float:
        """Factor on the dot products."""
        return float(self.kwargs.get("scaling") or self.query.shape[-1] ** -0.5)

    @property
    def dense_mask(self) -> Tensor | None:
        """The mask where it is one per pair of query and key, ``[B or 1, 1 or H, Nq, >= Nk]``, bool or additive."""
        return self.mask if isinstance(self.mask, Tensor) and self.mask.dim() == 4 else None

    def run_base(self) -> AttentionResult:
        """What the model's own function makes of this call, or what answers in its place."""
        if self.whole is not None:
            return self.whole(self)
        return self.base(self.query, self.key, self.value, self.mask)


Handler = Callable[[AttentionCall], AttentionResult]


class Port:
    """
    Marks an attention module as one whose calls a handler wants to see.

    It is attached as a forward pre-hook that does nothing: the registered attention function finds it among the hooks
    of the module it is called with, so neither a global table nor an attribute on the module is needed.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        return None


class _View:
    """A stand-in for an object that answers some attributes differently."""

    def __init__(self, target: Any, **answers: Any) -> None:
        self._target = target
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        answers = object.__getattribute__(self, "_answers")
        return answers[name] if name in answers else getattr(object.__getattribute__(self, "_target"), name)


def base_name(config: Any) -> str:
    """Attention backend a configuration names, without our prefix; ``"eager"`` when it names none."""
    return (getattr(config, "_attn_implementation", None) or "eager").removeprefix(PREFIX)


def route(attachments: Attachments, configs: Iterable[Any]) -> None:
    """
    Send the attention of every module that holds one of these configurations through lmmhooks.

    Parameters
    ----------
    attachments
        Takes the changes back.
    configs
        Text or vision configurations; only their own backend name is changed, nested ones are left alone.

    Raises
    ------
    ModelError
        If the backend is paged attention, whose keys do not lie in sequence order.
    """
    for config in {id(config): config for config in configs}.values():
        base = base_name(config)
        if base.startswith("paged"):
            raise ModelError(
                f"attention backend {base!r} keeps keys in pages, which methods cannot read; "
                "load the model with attn_implementation='sdpa'"
            )
        _register(base)
        attachments.attribute(config, "_attn_implementation_internal", PREFIX + base, f"{type(config).__name__}.attn")


def _register(base: str) -> None:
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _front(base))
    if base in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys() and name not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _front(base: str) -> Callable[..., AttentionResult]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> AttentionResult:
        function = _base_function(module, base)
        # Flash kernels read the backend's name off module.config; ours would send them looking for a kernel so named.
        seen: Any = module
        if "flash" in base:
            seen = _View(module, config=_View(module.config, _attn_implementation=base))

        def call(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> AttentionResult:
            return function(seen, query, key, value, mask, **kwargs)

        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Port):
                return hook.handler(AttentionCall(query, key, value, attention_mask, kwargs, call, base))
        return call(query, key, value, attention_mask)

    attention.__name__ = f"{PREFIX}{base}"
    return attention


def _base_function(module: nn.Module, base: str) -> Callable[..., AttentionResult]:
    if base == "eager":
        # Not in the interface: every modelling file has its own, next to the attention class.
        for cls in type(module).__mro__:
            if (function := getattr(sys.modules[cls.__module__], "eager_attention_forward", None)) is not None:
                return function
        raise ModelError(f"{type(module).__name__} has no eager attention; load the model with another backend")
    return ALL_ATTENTION_FUNCTIONS[base]
