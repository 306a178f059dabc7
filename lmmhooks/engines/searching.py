"""
Runs methods that judge the candidates of beam search, in the place of transformers' own beam search.

``model.generate(num_beams=...)`` works as before: the call goes through ``generate`` itself with a loop of ours as its
``custom_generate``. Continuations are chosen by transformers' own functions; what differs is that logits of candidates
are penalised before, and that a sample may go back to an earlier step.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerationMode

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.beams import Beams, Rules, top_candidates
from lmmhooks.engines.lookahead import Lookahead, Siblings, Sight
from lmmhooks.errors import PromptError
from lmmhooks.methods.decoding.search import Judgement, SearchMethod

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    from lmmhooks.engines.runtime import Runtime

__all__ = ["SearchEngine"]

FLOOR = -999.0
"""Logit of what must not be chosen, so that it can be for want of anything else (authors' code of OPERA)."""


@dataclass(eq=False)
class _Past:
    """What is needed to choose the token of one step anew."""

    beams: Beams
    trail: Tensor
    parents: Tensor
    tokens: Tensor


@dataclass(eq=False)
class _Sample:
    """The search of one sample."""

    beams: Beams
    trail: Tensor
    judged: bool
    """False for a sample without image, which is searched as if there were no method."""
    locations: list[Tensor] = field(default_factory=list)
    past: list[_Past] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    rejected: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By step, beams and tokens that were chosen there before."""
    is_over: bool = False
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


class SearchEngine:
    """Attaches one method that judges candidates of beam search to a model."""

    def __init__(self, runtime: Runtime, methods: Sequence[SearchMethod]) -> None:
        self.runtime = runtime
        self.family = runtime.family
        [self.method] = methods
        self.siblings = Siblings(runtime, self.method.id)

    def attach(self, attachments: Attachments) -> None:
        """Hook the decoder and put our loop in front of ``generate``; must come after what hands layers masks."""
        self.siblings.attach(attachments)
        model = self.family.model
        original = model.generate
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs)
            self._check_call({**given.arguments, **given.arguments.get("kwargs", {})})
            return original(*args, **{**kwargs, "custom_generate": self._search})

        attachments.attribute(model, "generate", generate, "model.generate")

    # -- the call ------------------------------------------------------------------------------------------------------

    def _check_call(self, given: dict[str, Any]) -> None:
        """Refuse, before anything runs, what is no beam search of ours."""
        name = self.method.id
        if given.get("custom_generate") is not None:
            raise PromptError(f"{name} searches in a loop of its own; leave custom_generate out")
        if given.get("streamer") is not None:
            raise PromptError(f"{name} is a beam search, which cannot be streamed; leave streamer out")
        settings = {k: v for k, v in given.items() if k not in ("kwargs", *_NO_SETTINGS)}
        config, _ = self.family.model._prepare_generation_config(given.get("generation_config"), **settings)
        mode = config.get_generation_mode(given.get("assistant_model"))
        if mode is not GenerationMode.BEAM_SEARCH:
            raise PromptError(
                f"{name} judges candidates of beam search, but this call asks for {mode.value.replace('_', ' ')}; "
                "pass num_beams=5 and do_sample=False, or generate inside patch.disabled()"
            )
        for wanted in ("output_attentions", "output_hidden_states"):
            if getattr(config, wanted, None):
                raise PromptError(f"{name} reads tokens it does not choose; {wanted} is not available, leave it out")
        if config.stop_strings is not None:
            raise PromptError(
                f"{name} is given its stopping criteria without a tokenizer; instead of stop_strings pass "
                "stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]"
            )
        if config.use_cache is False or config.cache_implementation not in (None, "dynamic"):
            raise PromptError(
                f"{name} takes candidates back from a dynamic cache, but this call has use_cache={config.use_cache} "
                f"and cache_implementation={config.cache_implementation!r}; leave both out"
            )
        if config.low_memory:
            raise PromptError(f"{name} reads all candidates at once; leave low_memory out")

    def _search(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        visual = torch.tensor(self._visual_ids, device=input_ids.device)
        judged = torch.isin(input_ids, visual).any(dim=1)[:: generation_config.num_beams].tolist()
        if not any(judged):
            return type(model)._beam_search(
                model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
            )
        run = _Run(self, logits_processor, stopping_criteria, generation_config)
        return run(input_ids, model_kwargs, judged)

    @property
    def _visual_ids(self) -> list[int]:
        return [i for i in (self.family.image_token_id, self.family.video_token_id) if i is not None]


_NO_SETTINGS = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
    "synced_gpus",
    "trust_remote_code",
)
"""Parameters of ``generate`` that its configuration knows nothing of."""


class _Run:
    """One ``generate`` call."""

    def __init__(
        self,
        engine: SearchEngine,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        self.engine = engine
        self.method = engine.method
        self.model = engine.family.model
        self.processor = logits_processor
        self.criteria = stopping_criteria
        self.config = config
        self.num_beams = config.num_beams
        self.samples: list[_Sample] = []
        self.answers: list[Tensor] = []
        """Per sample ``[b, t]``: what its rows of the cache hold behind the prompt, after the end of a search too."""
        self.rules: Rules
        self.ahead: Lookahead

    def __call__(self, input_ids: Tensor, model_kwargs: dict[str, Any], judged: Sequence[bool]) -> Any:
        self.rules = Rules.of(self.model, self.config, input_ids.shape[1])
        outputs = self.model._prefill(input_ids, self.config, model_kwargs, is_first_iteration=True)
        self.ahead = Lookahead(self.engine.runtime, self.engine.siblings, model_kwargs, outputs.past_key_values)
        device = input_ids.device
        # The logarithm of a product of hundreds of factors; devices without float64 make do with float32.
        wide = torch.float32 if device.type == "mps" else torch.float64
        for prompt, is_judged in zip(input_ids.split(self.num_beams), judged, strict=True):
            trail = torch.zeros(self.num_beams, 0, dtype=wide, device=device)
            self.samples.append(_Sample(Beams.start(prompt, self.rules), trail, is_judged))
            self.answers.append(prompt[:, :0])
        logits = outputs.logits[:, -1].to(device=device, dtype=torch.float32, copy=True)
        del outputs
        while not all(sample.is_over for sample in self.samples):
            logits = self._step(logits)
        return self._result()

    # -- one token -----------------------------------------------------------------------------------------------------

    def _step(self, logits: Tensor) -> Tensor:
        """Choose a token for every beam; ``[R, vocabulary]`` raw logits before and after it."""
        candidates = top_candidates(logits, self.method.candidates_per_beam)
        after, sight = self.ahead.look(candidates, self._lengths())
        judgements = [self._judge(i, sight) for i in range(len(self.samples))]
        raw, masked = logits, torch.full_like(logits, FLOOR)
        penalty = torch.cat([judgement.penalty for judgement in judgements])
        masked.scatter_(1, candidates, logits.gather(1, candidates) - penalty)
        back = [self._retrospect(sample, judgement) for sample, judgement in zip(self.samples, judgements, strict=True)]
        rewound = any(step is not None for step in back)
        if rewound:
            raw = self._go_back(back)
        rows = range(len(self.samples))
        next_logits = torch.stack([self._next_logits(i, raw, masked, back[i]) for i in rows]).flatten(0, 1)
        parents, tokens = self._choose(raw, next_logits)
        offsets = torch.arange(len(self.samples), device=parents.device)[:, None] * self.num_beams
        flat = (parents + offsets).flatten()
        lengths = self._lengths()
        self.answers = [
            torch.cat([answer[own], new[:, None]], dim=1)
            for answer, own, new in zip(self.answers, parents, tokens, strict=True)
        ]
        if not rewound:
            matches = candidates[flat] == tokens.flatten()[:, None]
            if bool(matches.any(dim=1).all()):
                ordinals = matches.to(torch.uint8).argmax(dim=1)
                self.ahead.keep(flat, ordinals)
                for sample, judgement, own, which in zip(
                    self.samples, judgements, parents, ordinals.split(self.num_beams), strict=True
                ):
                    sample.trail = judgement.trails[own, which]
                return after[flat, ordinals].to(logits.device)
        # Something else was chosen than what has been read.
        after, sight = self.ahead.read(flat, tokens.flatten(), lengths)
        for i, own in enumerate(parents):
            self.samples[i].trail = self.samples[i].trail[own]
            self.samples[i].trail = self._judge(i, sight).trails[:, 0]
        return after[:, -1].to(logits.device)

    def _judge(self, index: int, sight: Sight) -> Judgement:
        sample = self.samples[index]
        rows = slice(index * self.num_beams, (index + 1) * self.num_beams)
        # Columns before those of this sample's answer are padding.
        attention = sight.attention[rows, :, -1 - sample.trail.shape[1] :].to(sample.trail.device)
        return self.method.judge(attention, sight.image[rows].to(attention), sample.trail)

    def _retrospect(self, sample: _Sample, judgement: Judgement) -> int | None:
        sample.locations.append(judgement.location)
        if sample.is_over or not sample.judged:
            return None
        return self.method.retrospect(torch.stack(sample.locations, dim=1), sample.attempts)

    def _next_logits(self, index: int, raw: Tensor, masked: Tensor, back: int | None) -> Tensor:
        """``[b, vocabulary]`` of one sample, before processors."""
        sample = self.samples[index]
        rows = slice(index * self.num_beams, (index + 1) * self.num_beams)
        if not sample.judged:
            return raw[rows]
        if back is None:
            return masked[rows]
        logits = raw[rows] - (raw[rows].amin(dim=-1, keepdim=True) - FLOOR)
        for parents, tokens in sample.rejected[back]:
            logits[parents, tokens] = FLOOR
        return logits

    def _go_back(self, back: Sequence[int | None]) -> Tensor:
        """Take samples back to the step they choose anew; raw logits of all rows at their steps."""
        for index, (sample, wanted) in enumerate(zip(self.samples, back, strict=True)):
            if wanted is None:
                continue
            sample.attempts[wanted] += 1
            # The step before this one has been chosen, the current one has not.
            step = min(wanted, len(sample.past) - 1)
            then = sample.past[step]
            sample.rejected.pop(wanted + 1, None)
            sample.rejected.setdefault(wanted, []).append((then.parents, then.tokens))
            sample.beams, sample.trail = then.beams, then.trail
            del sample.past[step:], sample.locations[step + 1 :], sample.logits[step:], sample.scores[step:]
            self.answers[index] = then.beams.tokens[:, self.rules.prompt_length :]
        logits, _ = self.ahead.read_again([row for answer in self.answers for row in answer])
        return logits[:, -1].to(self.answers[0].device)

    # -- choosing ------------------------------------------------------------------------------------------------------

    def _choose(self, raw: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Beam ``[S, b]`` every new running beam comes from, and its token."""
        scores = self._process(logits.log_softmax(dim=-1))
        active = [i for i, sample in enumerate(self.samples) if not sample.is_over]
        own = scores.split(self.num_beams)
        chosen = {i: self.samples[i].beams.extend(own[i], self.rules) for i in active}
        ends = self._ends({i: chosen[i].sequences[0, :, : self.samples[i].beams.length + 1] for i in active})
        beams = torch.arange(self.num_beams, device=logits.device)
        parents, tokens, over = [], [], []
        for i, sample in enumerate(self.samples):
            if i not in chosen:
                # Its rows go on, because the batch does; nobody looks at them.
                parents.append(beams)
                tokens.append(own[i].argmax(dim=-1))
                continue
            before = sample.beams
            sample.beams, parent, token, is_over = chosen[i].settle(ends[i], self.rules)
            parents.append(parent)
            tokens.append(token)
            over.append(is_over)
            sample.past.append(_Past(before, sample.trail, parent, token))
            if self.config.return_dict_in_generate:
                rows = slice(i * self.num_beams, (i + 1) * self.num_beams)
                sample.logits += [raw[rows].clone()] if self.config.output_logits else []
                sample.scores += [own[i].clone()] if self.config.output_scores else []
        # The one transfer that every beam search makes per step.
        for i, is_over in zip(active, torch.stack(over).tolist(), strict=True):
            self.samples[i].is_over = is_over
        return torch.stack(parents), torch.stack(tokens)

    def _process(self, scores: Tensor) -> Tensor:
        """Logits processors see all rows at once, at the length that a sample has."""
        lengths = [sample.beams.length for sample in self.samples]
        processed: list[Tensor] = [scores] * len(self.samples)
        for length in sorted(set(lengths)):
            tokens = torch.cat([sample.beams.running[0, :, :length] for sample in self.samples])
            out = self.processor(tokens, scores.clone() if len(set(lengths)) > 1 else scores).split(self.num_beams)
            for i, own in enumerate(out):
                if lengths[i] == length:
                    processed[i] = own
        return torch.cat(processed)

    def _ends(self, continued: dict[int, Tensor]) -> dict[int, Tensor]:
        """By sample ``[k]`` bool: which of its continuations ``[k, length]`` meet a stopping criterion."""
        ends: dict[int, Tensor] = {}
        for length in sorted({tokens.shape[1] for tokens in continued.values()}):
            same = {i: tokens for i, tokens in continued.items() if tokens.shape[1] == length}
            met = self.criteria(torch.cat(list(same.values())), None).split(self.rules.num_kept)
            ends |= dict(zip(same, met, strict=True))
        return ends

    def _lengths(self) -> Tensor:
        """``[R]`` tokens behind the prompt in every row of the cache."""
        lengths = [answer.shape[1] for answer in self.answers for _ in range(self.num_beams)]
        return torch.tensor(lengths, device=self.answers[0].device)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _result(self) -> Any:
        num, prompt = self.config.num_return_sequences, self.rules.prompt_length
        ended = [sample.beams for sample in self.samples]
        sequences = torch.cat([beams.ended[0, :num] for beams in ended])
        indices = [
            torch.where(beams.ended_indices[0, :num] < 0, -1, beams.ended_indices[0, :num] + i * self.num_beams)
            for i, beams in enumerate(ended)
        ]
        beam_indices = torch.cat(indices)
        length = int((beam_indices >= 0).sum(dim=1).max())
        sequences, beam_indices = sequences[:, : prompt + length], beam_indices[:, :length]
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=torch.cat([b.ended_scores[0, :num] for b in ended]) if self.config.output_scores else None,
            scores=self._per_step([sample.scores for sample in self.samples], self.config.output_scores),
            logits=self._per_step([sample.logits for sample in self.samples], self.config.output_logits),
            beam_indices=beam_indices,
            past_key_values=self.ahead.cache,
        )

    def _per_step(self, kept: Sequence[list[Tensor]], wanted: bool | None) -> tuple[Tensor, ...] | None:
        """Per step ``[R, vocabulary]``; samples that ended earlier show -inf."""
        if not wanted:
            return None
        nothing = torch.full_like(kept[0][0], -torch.inf)
        steps = range(max(map(len, kept)))
        return tuple(torch.cat([own[i] if i < len(own) else nothing for own in kept]) for i in steps)
