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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from lmmhooks.engines.asking import PromptAsker
from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.branch_attention import BranchAttender
from lmmhooks.engines.branch_cache import BranchCache, refuse_static
from lmmhooks.engines.branch_features import PromptAttention, PromptReader
from lmmhooks.engines.branch_rows import main_rows, position_after, refuse_drafts, tokens_of
from lmmhooks.engines.branch_vision import BranchEncoder
from lmmhooks.engines.branches import PromptStacker, StackedPrompt
from lmmhooks.engines.lazy_branches import LazyBranches
from lmmhooks.engines.prefix_sharing import SharedPrompt, can_share
from lmmhooks.engines.step_reading import StepReader
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.decoding.base import DecodingMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["BranchEngine"]


@dataclass(eq=False)
class _Call:
    """One forward of the caller: its rows, and how its output is to be read."""

    rows: int
    blocks: int = 1
    cache: BranchCache | None = None
    lazy: LazyBranches | None = None
    logits_to_keep: Any = 0
    as_tuple: bool = False
    attention: PromptAttention | None = None
    """What branches that read after the main rows will know of those."""
    shared: SharedPrompt | None = None
    """Branches that read what they do not have in common with the main rows once those were read."""
    generated: int | None = None
    """Generated tokens in the prompt of a forward without cache."""


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
        self.stacker = PromptStacker(runtime, self.method, self.branches, self.encoder)
        # Main rows whose text is edited are made here as well, and described by a cache of their own.
        self.stacks = bool(self.branches) or not self.stacker.main.same_tokens
        self.reader = StepReader(runtime, self.method)
        self.prompt_reader = PromptReader(runtime, self.method)
        asked = self.method.asks_first(self.family) if self.branches else None
        self.asker = PromptAsker(runtime, self.method, *asked, self.encoder, self._run) if asked else None
        self.attender = BranchAttender(runtime, self.method, self.branches)
        self._names = list(inspect.signature(self.family.model.forward).parameters)
        self._call: _Call | None = None
        self._uncached: tuple[Tensor, int] | None = None
        """Prompt of the newest forward without cache, and that forward's length."""
        self._inside = False
        # Branches that had to read after the main rows join them for the answer. What other methods remember of the
        # main rows knows nothing of the branches', which then keep a forward of their own.
        self.merges = self.apart and not self.lazy and len(runtime.methods()) == 1 and not runtime.probes

        # Methods below act on what a forward reads, and one of branches would not read its prompt from the beginning.
        self.shares = (
            bool(self.branches)
            and not self.apart
            and not self.stacker.same_tokens
            and all(branch.image == "same" for branch in (self.stacker.main, *self.branches))
            and len(runtime.methods()) == 1
            and not runtime.probes
            and not self.method.branch_layers(self.family)
        )

    def attach(self, attachments: Attachments) -> None:
        """Hook the model; must come before the hooks that follow prompts, which are to see the stacked rows."""
        if self.stacks:
            attachments.attribute(self.runtime, "encoder_hook", self.encoder, "encoder of the branches")
        attachments.pre_hook(self.family.model, self._enter, "branches of the model")
        attachments.hook(self.family.model, self._leave, "branches of the model", always=True)

    # -- before the forward --------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside:
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
        call = _Call(
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

    def _limit_positions(self, call: _Call, kwargs: dict[str, Any], is_prompt: bool) -> None:
        """The decoder is read at the newest token, or at as many of the last ones as the caller wants."""
        if isinstance(call.logits_to_keep, Tensor) or (is_prompt and self.reader.probes and call.logits_to_keep > 1):
            raise PromptError(
                f"logits_to_keep={call.logits_to_keep!r} asks for positions of the prompt at which {self.method.id} "
                "does not read the decoder; leave it out, and generate without drafts that come with the prompt "
                "(prompt_lookup_num_tokens, assistant_model)"
            )
        call.logits_to_keep = kwargs["logits_to_keep"] = max(call.logits_to_keep, 1)
        self.reader.begin(call.rows, call.logits_to_keep)

    def _begin(self, call: _Call, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the forward that reads the prompt."""
        encoded = self.stacker.encode(given)
        self.stacker.check(encoded)
        if self.prompt_reader.layers or self.attender.hides:
            refuse_drafts(self.method.id, call.logits_to_keep)
        if not self._caches(encoded):
            call.generated = self._count_uncached(encoded)
        if not self.apart:
            stacked = self.stacker.stack(encoded, with_main=True, replies=self._replies(encoded))
            if self.shares and self._caches(encoded) and can_share(self._inner_cache(encoded)):
                call.shared = SharedPrompt.of(stacked, call.rows, self.family.visual_ids)
            if call.shared is not None:
                return self._prompt_forward(call, call.shared.main, encoded)
            call.blocks = 1 + len(self.branches)
            return self._prompt_forward(call, stacked, encoded)
        self.attender.rows = {}
        self.prompt_reader.begin()
        call.attention = PromptAttention()
        read = partial(self._read_lazily, call.attention)
        call.lazy = LazyBranches(encoded, call.rows, read, self._continue_lazily)
        kwargs = dict(encoded)
        if self.family.mrope:
            kwargs["position_ids"] = self.stacker.positions(encoded)
        if self._caches(encoded):
            call.cache = kwargs["past_key_values"] = self._main_cache(kwargs, call.lazy)
        return self.stacker.hand_over(kwargs, encoded)

    def _prompt_forward(self, call: _Call, stacked: StackedPrompt, encoded: dict[str, Any]) -> dict[str, Any]:
        kwargs = stacked.kwargs
        self.attender.follow(len(kwargs["input_ids"]) // call.blocks, call.blocks)
        if self._caches(kwargs):
            call.cache = BranchCache(self._inner_cache(kwargs), call.blocks, stacked.mask, stacked.next_position)
            kwargs["past_key_values"] = call.cache
        if not self.stacker.same_tokens:
            # Only the last position is the same place in prompts of different lengths.
            if isinstance(call.logits_to_keep, Tensor) or call.logits_to_keep > 1:
                raise PromptError(
                    f"logits_to_keep={call.logits_to_keep!r} asks for several positions of a prompt that "
                    f"{self.method.id} reads in different lengths; only the last one can be combined: leave it out"
                )
            kwargs["logits_to_keep"] = 1
        self.runtime.prepared = (stacked.layout, stacked.vision)
        return self.stacker.hand_over(kwargs, encoded)

    def _continue(self, call: _Call, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
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
        return {**kwargs, **self._continuation(cache, kwargs)}

    def _continuation(self, cache: BranchCache, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Tokens, mask and positions of every branch's rows; those of the caller describe the main rows only."""
        out = {
            name: kwargs[name].repeat(cache.num_branches, *[1] * (kwargs[name].ndim - 1))
            for name in ("input_ids", "inputs_embeds", "token_type_ids")
            if kwargs.get(name) is not None
        }
        num_rows, num_new = next(iter(out.values())).shape[:2]
        self.attender.follow(num_rows // cache.num_branches, cache.num_branches)
        out["attention_mask"], out["position_ids"] = cache.continuation(num_new)
        return {**out, "mm_token_type_ids": None} if "mm_token_type_ids" in kwargs else out

    def _caches(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        return bool(getattr(self.family.text_config, "use_cache", True) if wanted is None else wanted)

    def _inner_cache(self, kwargs: dict[str, Any]) -> Cache:
        """The cache of the caller, or one as the model would make."""
        given: Cache | None = kwargs.get("past_key_values")
        return DynamicCache(config=self.family.text_config) if given is None else given

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
        cache = BranchCache(self._inner_cache(kwargs), 1, None, following)
        cache.follower = lazy
        return cache

    def _read_lazily(
        self, attention: PromptAttention, prompt: dict[str, Any], logits_to_keep: Any
    ) -> tuple[Tensor, BranchCache]:
        given = {**prompt, "past_key_values": None, "use_cache": True}
        stacked = self.stacker.stack(given, with_main=False, attention=attention, replies=self._replies(prompt))
        call = _Call(rows=0, blocks=len(self.branches), logits_to_keep=logits_to_keep)
        kwargs = self._prompt_forward(call, stacked, prompt)
        kwargs["logits_to_keep"] = logits_to_keep if self.stacker.same_tokens else 1
        logits = self._run(kwargs)
        assert call.cache is not None
        call.cache.prompt_read()
        return logits, call.cache

    def _replies(self, encoded: dict[str, Any]) -> list[Tensor] | None:
        return None if self.asker is None else self.asker.ask(encoded)

    def _continue_lazily(self, tokens: Tensor, cache: BranchCache, logits_to_keep: Any) -> tuple[Tensor, BranchCache]:
        kwargs = self._continuation(cache, {"input_ids": tokens})
        return self._run({**kwargs, "past_key_values": cache, "logits_to_keep": logits_to_keep}), cache

    def _read_suffixes(self, call: _Call, shared: SharedPrompt) -> list[Tensor]:
        """Logits ``[B, 1, vocabulary]`` per branch, which joins the rows of the main cache."""
        state, num, cache = self.runtime.last_state, len(self.branches), call.cache
        assert cache is not None
        kwargs, prefix, begun = shared.suffix(cache, DynamicCache(config=self.family.text_config))
        branches = BranchCache(prefix, num, None, shared.stacked.next_position[..., call.rows :])
        self.runtime.adopt(branches, begun)
        logits = self._run({**kwargs, "past_key_values": branches, "logits_to_keep": 1})
        cache.append(branches)
        cache.mask, cache.next_position = shared.stacked.mask, shared.stacked.next_position
        state.read(shared.stacked.layout, shared.stacked.mask)
        state.blocks = 1 + num
        return list(logits.unflatten(0, (num, call.rows)))

    def _run(self, kwargs: dict[str, Any]) -> Tensor:
        """A forward of the branch rows alone, inside the forward of the caller."""
        newest = self.runtime.last
        self._inside, self.reader.listening, self.runtime.aside = True, False, True
        try:
            logits: Tensor = self.family.model(**{**kwargs, "use_cache": True, "return_dict": True}).logits
        finally:
            self._inside, self.reader.listening, self.runtime.aside = False, True, False
            self.runtime.last = newest
        return logits.float()

    # -- after the forward ---------------------------------------------------------------------------------------------

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._inside:
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
            others = self._read_suffixes(call, call.shared)
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
            view = self.reader.view(i - num)
            combined.append(self.method.combine(main[:, i], [other[:, i] for other in others], step, view))
        return torch.stack(combined, dim=1)

    def _combine_lazily(self, call: _Call, lazy: LazyBranches, main: Tensor, grown: int) -> Tensor:
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
