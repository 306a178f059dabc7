"""
Forwards of branch rows: what a forward of the caller becomes, and those that run inside it.

Branches read the prompt in one forward with the main rows wherever that is the cheapest way. Otherwise the main rows
read it alone and branches after them: because they depend on what the main rows attended to, because most of their
prompt is in the main rows' cache already, because they are much shorter, or because nothing they say matters yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache, DynamicCache

from lmmhooks.engines.asking import PromptAsker
from lmmhooks.engines.branch_attention import BranchAttender
from lmmhooks.engines.branch_cache import BranchCache
from lmmhooks.engines.branch_features import PromptAttention
from lmmhooks.engines.branch_vision import BranchEncoder
from lmmhooks.engines.branches import PromptStacker
from lmmhooks.engines.lazy_branches import LazyBranches
from lmmhooks.engines.memory import refuse_unfit
from lmmhooks.engines.prefix_sharing import SharedPrompt, can_share
from lmmhooks.engines.stacked_prompt import StackedPrompt
from lmmhooks.engines.step_reading import StepReader
from lmmhooks.errors import PromptError
from lmmhooks.methods.decoding.base import Branch, DecodingMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["BranchForwards", "Call"]


@dataclass(eq=False)
class Call:
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
    encoded: dict[str, Any] | None = None
    """Arguments of the caller where branches are still to read the prompt, images encoded."""
    generated: int | None = None
    """Generated tokens in the prompt of a forward without cache."""


class BranchForwards:
    """
    Makes the arguments of forwards that have branch rows, and runs those that have nothing else.

    Parameters
    ----------
    runtime, method, branches
        What is attached, and its branches.
    encoder
        That notes the encoder calls of prompts.
    reader
        Looks at the main rows only: it is told when it must not listen.
    apart
        The main rows read every prompt alone.

    Attributes
    ----------
    inside
        Whether a forward of branch rows is under way inside that of the caller.
    """

    def __init__(
        self,
        runtime: Runtime,
        method: DecodingMethod,
        branches: Sequence[Branch],
        encoder: BranchEncoder,
        reader: StepReader,
        apart: bool,
    ) -> None:
        self.runtime = runtime
        self.family = runtime.family
        self.method = method
        self.branches = list(branches)
        self.reader = reader
        self.stacker = PromptStacker(runtime, method, branches, encoder)
        self.attender = BranchAttender(runtime, method, branches)
        asked = method.asks_first(runtime.family) if branches else None
        self.asker = PromptAsker(runtime, method, *asked, encoder, self.run) if asked else None
        self.inside = False
        self._apart = apart
        # Methods below act on what a forward reads, and one of branches would not read its prompt from the beginning.
        self._shares = (
            bool(branches)
            and not apart
            and not self.stacker.same_tokens
            and all(branch.image in ("same", "none", "replaced") for branch in (self.stacker.main, *branches))
            and len(runtime.methods()) == 1
            and not runtime.probes
            and not method.branch_layers(runtime.family)
        )

    def caches(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward keeps keys and values."""
        wanted = kwargs.get("use_cache")
        return bool(getattr(self.family.text_config, "use_cache", True) if wanted is None else wanted)

    def inner_cache(self, kwargs: dict[str, Any]) -> Cache:
        """The cache of the caller, or one as the model would make."""
        given: Cache | None = kwargs.get("past_key_values")
        return self._empty() if given is None else given

    def _empty(self) -> DynamicCache:
        return DynamicCache(config=self.family.text_config)

    def check_memory(self, encoded: dict[str, Any], lazy: bool) -> None:
        """
        Refuse more rows than there is room for.

        Parameters
        ----------
        encoded
            Arguments of a forward that reads a prompt.
        lazy
            Branches keep to themselves.
        """
        if any(method.kind == "reduction" for method in self.runtime.methods()):
            return  # how long prompts are when they enter the decoder is not known yet
        cache = encoded.get("past_key_values")
        batch, length = encoded["input_ids"].shape
        # Branches with fewer tokens are filled up in a cache that they share with the main rows.
        wide = sum(branch.same_tokens for branch in self.branches)
        together = not self._apart and self.stacker.same_tokens
        refuse_unfit(
            self.family,
            self.method.id,
            batch,
            length,
            readings=1 + (wide if lazy else len(self.branches)),
            readings_at_once=1 + wide if together else max(1, wide if self._apart else 0),
            caches=self.caches(encoded) and not getattr(cache, "offloading", False),
        )

    # -- what a forward of the caller becomes --------------------------------------------------------------------------

    def begin(self, call: Call, encoded: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the forward that reads a prompt in all branches, or in the main rows if that is better."""
        stacked = self.stacker.stack(encoded, with_main=True, replies=self._replies(encoded))
        if self._shares and self.caches(encoded) and can_share(self.inner_cache(encoded)):
            as_given = [branch.image == "same" for branch in self.branches]
            call.shared = SharedPrompt.of(stacked, call.rows, self.family.visual_ids, as_given)
        if call.shared is not None:
            call.encoded = encoded
            return self._prompt(call, call.shared.main, encoded)
        call.blocks = 1 + len(self.branches)
        return self._prompt(call, stacked, encoded)

    def _prompt(self, call: Call, stacked: StackedPrompt, encoded: dict[str, Any]) -> dict[str, Any]:
        kwargs = stacked.kwargs
        self.attender.follow(len(kwargs["input_ids"]) // call.blocks, call.blocks)
        if self.caches(kwargs):
            call.cache = BranchCache(self.inner_cache(kwargs), call.blocks, stacked.mask, stacked.next_position)
            kwargs["past_key_values"] = call.cache
        self.limit_positions(call, kwargs)
        self.runtime.prepared = (stacked.layout, stacked.vision)
        return self.stacker.hand_over(kwargs, encoded)

    def limit_positions(self, call: Call, kwargs: dict[str, Any]) -> None:
        """Only the last position is the same place in prompts of different lengths."""
        if self.stacker.same_tokens:
            return
        if isinstance(call.logits_to_keep, Tensor) or call.logits_to_keep > 1:
            raise PromptError(
                f"logits_to_keep={call.logits_to_keep!r} asks for several positions of a prompt that "
                f"{self.method.id} reads in different lengths; only the last one can be combined: leave it out"
            )
        kwargs["logits_to_keep"] = 1

    def continuation(self, cache: BranchCache, kwargs: dict[str, Any]) -> dict[str, Any]:
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

    # -- forwards of branch rows alone ---------------------------------------------------------------------------------

    def read(
        self, attention: PromptAttention, prompt: dict[str, Any], logits_to_keep: Any
    ) -> tuple[Tensor, BranchCache]:
        """
        Read a prompt that the main rows have read.

        Parameters
        ----------
        attention
            What those attended to.
        prompt
            Arguments of the caller, images encoded.
        logits_to_keep
            At how many of the last positions logits are wanted.

        Returns
        -------
        logits
            ``[branches * B, k, vocabulary]`` float32.
        cache
            What the branches continue.
        """
        given = {**prompt, "past_key_values": None, "use_cache": True}
        stacked = self.stacker.stack(given, with_main=False, attention=attention, replies=self._replies(prompt))
        keep = logits_to_keep if self.stacker.same_tokens else 1
        call = Call(rows=0, blocks=len(self.branches), logits_to_keep=logits_to_keep)
        kwargs = self._prompt(call, stacked if self.stacker.same_tokens else stacked.narrowed(), prompt)
        logits = self.run({**kwargs, "logits_to_keep": keep})
        assert call.cache is not None
        call.cache.prompt_read()
        if (state := self.runtime.state_of(call.cache)) is not None:
            self.runtime.last_state.readings.append(state)
        return logits, call.cache

    def go_on(self, tokens: Tensor, cache: BranchCache, logits_to_keep: Any) -> tuple[Tensor, BranchCache]:
        """Read ``tokens [B, q]`` behind what branches have read; as `read`."""
        kwargs = self.continuation(cache, {"input_ids": tokens})
        return self.run({**kwargs, "past_key_values": cache, "logits_to_keep": logits_to_keep}), cache

    def read_rest(self, call: Call, shared: SharedPrompt) -> list[Tensor]:
        """Logits ``[B, 1, vocabulary]`` per branch, which joins the rows of the main cache."""
        state, num, cache, stacked = self.runtime.last_state, len(self.branches), call.cache, shared.stacked
        assert cache is not None
        assert call.encoded is not None
        if shared.behind_main:
            kwargs, prefix, begun = shared.suffix(cache, self._empty())
            branches = BranchCache(prefix, num, None, stacked.next_position[..., call.rows :])
            self.runtime.adopt(branches, begun)
        else:
            alone = shared.alone
            branches = BranchCache(self._empty(), num, None, alone.next_position)
            self.runtime.prepared = (alone.layout, alone.vision)
            kwargs = self.stacker.hand_over(alone.kwargs, call.encoded)
        logits = self.run({**kwargs, "past_key_values": branches, "logits_to_keep": 1})
        cache.append(branches)
        cache.mask, cache.next_position = stacked.mask, stacked.next_position
        state.read(stacked.layout, stacked.mask)
        state.taken = shared.taken
        state.blocks = 1 + num
        return list(logits.unflatten(0, (num, call.rows)))

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """A forward of the branch rows alone, inside the forward of the caller; its logits, float32."""
        newest = self.runtime.last
        self.inside, self.reader.listening, self.runtime.aside = True, False, True
        try:
            logits: Tensor = self.family.model(**{**kwargs, "use_cache": True, "return_dict": True}).logits
        finally:
            self.inside, self.reader.listening, self.runtime.aside = False, True, False
            self.runtime.last = newest
        return logits.float()

    def _replies(self, encoded: dict[str, Any]) -> list[Tensor] | None:
        return None if self.asker is None else self.asker.ask(encoded)
