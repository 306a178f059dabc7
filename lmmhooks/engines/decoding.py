"""
Runs decoding methods: branches stacked as rows of one forward per step, their logits combined before ``generate`` sees
them.

A pre-hook of the model turns B rows into N * B (branch-major: branch j is the block ``[j * B, (j + 1) * B)``), a hook
combines the logits to B rows and hands them back. Greedy search, sampling, beams, processors, streamers and stopping
criteria of ``generate`` work on the combined logits without knowing; attention edits and reductions below see a batch
of N * B rows without knowing either.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.branch_cache import BranchCache, refuse_static
from lmmhooks.engines.branch_features import PromptAttention, PromptReader
from lmmhooks.engines.branch_forwards import BranchForwards, Call
from lmmhooks.engines.branch_rows import main_rows, position_after, refuse_drafts, tokens_of
from lmmhooks.engines.branch_vision import BranchEncoder
from lmmhooks.engines.lazy_branches import LazyBranches
from lmmhooks.engines.step_reading import StepReader
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.decoding.base import DecodingMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["BranchEngine"]


class BranchEngine:
    """
    Attaches one decoding method to a model.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    methods
        Exactly one.

    Raises
    ------
    MethodError
        For several methods, which would all define the next-token logits.
    """

    def __init__(self, runtime: Runtime, methods: Sequence[DecodingMethod]) -> None:
        if len(methods) != 1:
            names = ", ".join(method.id for method in methods) or "none"
            raise MethodError(f"one decoding method can act on a model at a time, given: {names}; remove the others")
        self.runtime = runtime
        self.family = runtime.family
        self.method = methods[0]
        self.branches = self.method.branches(self.family)
        self.lazy = self.method.lazy and bool(self.branches)
        self.apart = self.lazy or any(branch.after_main for branch in self.branches)
        """The main rows read the prompt alone, and branches after them."""
        self.encoder = BranchEncoder(runtime, self.method, self.branches, put_off=self.apart)
        if self.method.needs_tokenizer and runtime.tokenizer is None:
            raise MethodError(
                f"{self.method.id} reads or writes text with these settings, which needs the model's tokenizer; "
                "give its processor to wrap(model, ..., processor=processor)"
            )
        self.reader = StepReader(runtime, self.method)
        self.forwards = BranchForwards(runtime, self.method, self.branches, self.encoder, self.reader, self.apart)
        self.stacker, self.attender = self.forwards.stacker, self.forwards.attender
        # Main rows whose text is edited are made here as well, and described by a cache of their own.
        self.stacks = bool(self.branches) or not self.stacker.main.same_tokens
        self.prompt_reader = PromptReader(runtime, self.method)
        self._names = list(inspect.signature(self.family.model.forward).parameters)
        self._call: Call | None = None
        self._uncached: tuple[Tensor, int] | None = None
        """Prompt of the newest forward without cache, and that forward's length."""
        # Branches that had to read after the main rows join them for the answer. What other methods remember of the
        # main rows knows nothing of the branches', which then keep a forward of their own.
        self.merges = self.apart and not self.lazy and len(runtime.methods()) == 1 and not runtime.probes

    def attach(self, attachments: Attachments) -> None:
        """Hook the model; must come before the hooks that follow prompts, which are to see the stacked rows."""
        if self.stacks:
            attachments.attribute(self.runtime, "encoder_hook", self.encoder, "encoder of the branches")
        attachments.pre_hook(self.family.model, self._enter, "branches of the model")
        attachments.hook(self.family.model, self._leave, "branches of the model", always=True)

    # -- before the forward --------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.forwards.inside:
            return None
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.stacker.memory, self.stacker.notes = {}, []
        if kwargs.get("labels") is not None:
            raise PromptError(
                f"labels were given, but {self.method.id} defines next-token logits for generation and has no training "
                "loss; leave labels out, or run inside patch.disabled()"
            )
        new = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if new is None:
            raise PromptError("the model was called without input_ids; pass the inputs of its processor")
        returns_dict = kwargs.get("return_dict")
        call = Call(
            rows=int(new.shape[0]),
            logits_to_keep=0 if kwargs.get("logits_to_keep") is None else kwargs["logits_to_keep"],
            as_tuple=not (self.family.model.config.return_dict if returns_dict is None else returns_dict),
        )
        kwargs["return_dict"] = True
        cache = kwargs.get("past_key_values")
        if self.reader.reads:
            self._limit_positions(call, kwargs, is_prompt=cache is None or not cache.get_seq_length())
        if cache is not None and self.stacks:
            # Before anything reads the mask, which generate() has already shaped for such a cache.
            refuse_static(cache)
        if not self.stacks:
            pass
        elif cache is not None and cache.get_seq_length():
            kwargs = self._continue(call, cache, kwargs)
        else:
            kwargs = self._begin(call, kwargs)
        self._call = call
        return (), kwargs

    def _limit_positions(self, call: Call, kwargs: dict[str, Any], is_prompt: bool) -> None:
        """The decoder is read at the newest token, or at as many of the last ones as the caller wants."""
        if isinstance(call.logits_to_keep, Tensor) or (is_prompt and self.reader.probes and call.logits_to_keep > 1):
            raise PromptError(
                f"logits_to_keep={call.logits_to_keep!r} asks for positions of the prompt at which {self.method.id} "
                "does not read the decoder; leave it out, and generate without drafts that come with the prompt "
                "(prompt_lookup_num_tokens, assistant_model)"
            )
        call.logits_to_keep = kwargs["logits_to_keep"] = max(call.logits_to_keep, 1)
        self.reader.begin(call.rows, call.logits_to_keep)

    def _begin(self, call: Call, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the forward that reads the prompt."""
        encoded = self.stacker.encode(given)
        self.stacker.check(encoded)
        self.forwards.check_memory(encoded, self.lazy)
        if self.prompt_reader.layers or self.attender.hides:
            refuse_drafts(self.method.id, call.logits_to_keep)
        if not self.forwards.caches(encoded):
            call.generated = self._count_uncached(encoded)
        if not self.apart:
            return self.forwards.begin(call, encoded)
        self.attender.rows = {}
        self.prompt_reader.begin()
        call.attention = PromptAttention()
        read = partial(self.forwards.read, call.attention)
        call.lazy = LazyBranches(encoded, call.rows, read, self.forwards.go_on)
        kwargs = dict(encoded)
        self.forwards.limit_positions(call, kwargs)
        if self.family.mrope:
            kwargs["position_ids"] = self.stacker.positions(encoded)
        if self.forwards.caches(encoded):
            call.cache = kwargs["past_key_values"] = self._main_cache(kwargs, call.lazy)
        return self.stacker.hand_over(kwargs, encoded)

    def _continue(self, call: Call, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a forward that continues a prompt."""
        if not isinstance(cache, BranchCache):
            raise PromptError(
                f"the cache holds {cache.get_seq_length()} tokens that were not read under {self.method.id}; "
                "run the whole prompt under the patch, or start from an empty cache"
            )
        call.cache = cache
        if self.lazy or cache.follower is not None:
            if not isinstance(cache.follower, LazyBranches) or kwargs.get("input_ids") is None:
                raise PromptError(
                    f"{self.method.id} with lazy={self.lazy} continues a prompt it read itself, by input_ids; "
                    "run the whole prompt under the patch"
                )
            self.attender.rows = {}
            call.lazy = cache.follower
            call.lazy.push(kwargs["input_ids"])
            if self.family.mrope and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = cache.continuation(kwargs["input_ids"].shape[1])[1]
            return kwargs
        call.blocks = cache.num_branches
        return {**kwargs, **self.forwards.continuation(cache, kwargs)}

    def _count_uncached(self, kwargs: dict[str, Any]) -> int:
        """Generated tokens in a prompt that is read again at every step because there is no cache."""
        tokens = kwargs["input_ids"]
        length = int(tokens.shape[1])
        if self._uncached is not None:
            prompt, last = self._uncached
            if length == last + 1 and torch.equal(tokens[:, : prompt.shape[1]], prompt):
                self._uncached = prompt, length
                return length - int(prompt.shape[1])
        self._uncached = tokens, length
        return 0

    # -- branches on demand --------------------------------------------------------------------------------------------

    def _main_cache(self, kwargs: dict[str, Any], lazy: LazyBranches) -> BranchCache:
        tokens, mask = tokens_of(kwargs)
        following = torch.zeros_like(tokens[:, 0])
        if self.family.mrope:
            # A model remembers one offset of positions, and branches that it reads in between have others.
            following = position_after(kwargs["position_ids"], mask)
        # The mask of main rows is the caller's; this cache tells the branches what happens to the rows.
        cache = BranchCache(self.forwards.inner_cache(kwargs), 1, None, following)
        cache.follower = lazy
        return cache

    # -- after the forward ---------------------------------------------------------------------------------------------

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.forwards.inside:
            return None
        call, self._call = self._call, None
        self.runtime.prepared = None
        self.encoder.ready.clear()
        if call is None or output is None:  # the forward failed
            return None
        if call.cache is not None and call.cache.prompt_length is None:
            call.cache.prompt_read()
        state = self.runtime.last
        assert state is not None
        state.branches = 1 + len(self.branches)
        state.blocks = call.blocks
        if call.attention is not None:
            call.attention.of_image = self.prompt_reader.end(state.layout)
        logits = output.logits.float().unflatten(0, (call.blocks, call.rows))
        main, others = logits[0], list(logits[1:])
        if call.shared is not None:
            others = self.forwards.read_rest(call, call.shared)
            self.encoder.ready.clear()
        grown = state.grown if call.generated is None else call.generated
        if call.lazy is None:
            combined = self._combine(main, others, grown)
            state.branch_steps = 1.0 if self.branches else None
        else:
            combined = self._combine_lazily(call, call.lazy, main, grown)
            state.branch_steps = call.lazy.steps_run / call.lazy.steps
        self.reader.end()
        result = main_rows(output, combined, call.rows, call.blocks)
        return result.to_tuple() if call.as_tuple else result

    def _remember(self) -> None:
        """Hand what the method kept while the prompt was stacked over to the state of that prompt."""
        state = self.runtime.last
        assert state is not None
        state.memory(self.method).update(self.stacker.memory)
        state.notes += self.stacker.notes
        self.stacker.memory, self.stacker.notes = {}, []

    def _combine(self, main: Tensor, others: Sequence[Tensor], grown: int) -> Tensor:
        """``[B, k, vocabulary]``; the last of the k positions predicts generated token number ``grown``."""
        self._remember()
        num = main.shape[1]
        steps = [max(grown - (num - 1 - i), 0) for i in range(num)]
        combined = []
        for i, step in enumerate(steps):
            view, said = self.reader.view(i - num), [other[:, i] for other in others]
            if step == 0 and (hears := self.runtime.hears_first_scores) is not None:
                hears(self.method.combine(main[:, i], said, step, replace(view, cuts=False)))
            combined.append(self.method.combine(main[:, i], said, step, view))
        return torch.stack(combined, dim=1)

    def _combine_lazily(self, call: Call, lazy: LazyBranches, main: Tensor, grown: int) -> Tensor:
        lazy.steps += 1
        if self.lazy and main.shape[1] == 1:
            keep = self.method.keep(main[:, 0])
            if keep is not None and bool((keep.sum(dim=1) == 1).all()):
                return main.masked_fill(~keep[:, None], -torch.inf)
        caught_up = lazy.catch_up(call.logits_to_keep).unflatten(0, (len(self.branches), call.rows))
        if self.merges and call.attention is not None and call.cache is not None:
            assert lazy.cache is not None
            call.cache.append(lazy.cache)
            self.runtime.last_state.append_blocks(len(self.branches))
        return self._combine(main, [branch[:, -main.shape[1] :] for branch in caught_up], grown)
