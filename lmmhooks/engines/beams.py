"""The beams of one sample, advanced step by step by transformers' own selection; states are never changed in place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig

from lmmhooks.compat import continuation_arguments

__all__ = ["Beams", "Chosen", "Rules", "top_candidates"]


@dataclass(frozen=True)
class Rules:
    """What a ``generate`` call says about its beams, in the words of its configuration."""

    model: Any
    num_beams: int
    prompt_length: int
    max_length: int
    early_stopping: bool | str
    length_penalty: float
    num_kept: int
    """Continuations looked at per step, so that enough go on where some end."""
    fill: int

    @classmethod
    def of(cls, model: Any, config: GenerationConfig, prompt_length: int) -> Rules:
        """Read the configuration as prepared by ``generate``."""
        pad, eos = config._pad_token_tensor, config._eos_token_tensor
        num_eos = 0 if eos is None else eos.shape[0]
        # As plain beam search has it: `0` is no pad token there.
        fill = -1 if eos is None else int(pad or eos[0])
        kept = max(2, 1 + num_eos) * config.num_beams
        return cls(
            model,
            config.num_beams,
            prompt_length,
            config.max_length,
            config.early_stopping,
            config.length_penalty,
            kept,
            fill,
        )


@dataclass(frozen=True, eq=False)
class Beams:
    """
    Where the search of one sample stands; a batch of one in the terms of transformers.

    Attributes
    ----------
    running, running_scores, running_indices
        ``[1, b, max_length]`` tokens, ``[1, b]`` sums of log-probabilities, ``[1, b, new]`` beam each token came from.
    ended, ended_scores, ended_indices, is_ended
        The same of the best answers that have ended; entries that none has taken yet are False in ``is_ended``.
    improvable
        ``[1, 1]`` bool: some running beam may still beat the ended ones.
    length
        Tokens per running beam, prompt included.
    """

    running: Tensor
    running_scores: Tensor
    running_indices: Tensor
    ended: Tensor
    ended_scores: Tensor
    ended_indices: Tensor
    is_ended: Tensor
    improvable: Tensor
    length: int

    @classmethod
    def start(cls, prompt: Tensor, rules: Rules) -> Beams:
        """Beams ``[b, N]`` of a prompt, all equal; only the first counts in the first step."""
        beams, device = rules.num_beams, prompt.device
        tokens = prompt.new_empty(1, beams, rules.max_length)
        tokens[:] = rules.fill
        tokens[0, :, : rules.prompt_length] = prompt
        scores = torch.zeros(1, beams, device=device)
        scores[:, 1:] = -1e9
        shape = (1, beams, rules.max_length - rules.prompt_length)
        indices = torch.full(shape, -1, dtype=torch.int32, device=device)
        return cls(
            running=tokens,
            running_scores=scores,
            running_indices=indices,
            ended=tokens.clone(),
            ended_scores=torch.full((1, beams), -1e9, device=device),
            ended_indices=indices.clone(),
            is_ended=torch.zeros(1, beams, dtype=torch.bool, device=device),
            improvable=torch.ones(1, 1, dtype=torch.bool, device=device),
            length=rules.prompt_length,
        )

    @property
    def tokens(self) -> Tensor:
        """``[b, length]``: the running beams."""
        return self.running[0, :, : self.length]

    def extend(self, scores: Tensor, rules: Rules) -> Chosen:
        """The best continuations; ``scores [b, vocabulary]`` are processed log-probabilities of the next token."""
        total = (scores + self.running_scores[0, :, None]).flatten()[None]
        scores, tokens, indices = rules.model._get_top_k_continuations(
            accumulated_log_probs=total,
            running_sequences=self.running,
            running_beam_indices=self.running_indices,
            cur_len=self.length,
            decoder_prompt_len=rules.prompt_length,
            do_sample=False,
            beams_to_keep=rules.num_kept,
            num_beams=rules.num_beams,
            batch_size=1,
            **continuation_arguments(rules.model, scores.shape[-1]),
        )
        return Chosen(self, scores, tokens, indices)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The best continuations of some beams, some of which end here: ``[1, k]`` and ``[1, k, ...]`` as in `Beams`."""

    before: Beams
    scores: Tensor
    sequences: Tensor
    indices: Tensor

    def settle(self, ends: Tensor, rules: Rules) -> tuple[Beams, Tensor, Tensor, Tensor]:
        """
        Part continuations that end from those that go on.

        Parameters
        ----------
        ends
            ``[k]`` bool: a stopping criterion is met.
        rules
            Of the call.

        Returns
        -------
        beams
            After this step.
        parents, tokens
            ``[b]`` long: which beam each running one comes from, and what it adds.
        is_over
            Bool scalar: nothing of this sample will change any more.
        """
        model, old, ends = rules.model, self.before, ends[None]
        running, running_scores, running_indices = model._get_running_beams_for_next_iteration(
            topk_log_probs=self.scores,
            topk_running_sequences=self.sequences,
            topk_running_beam_indices=self.indices,
            next_token_hits_stopping_criteria=ends,
            num_beams=rules.num_beams,
        )
        ended, ended_scores, ended_indices, is_ended = model._update_finished_beams(
            sequences=old.ended,
            topk_running_sequences=self.sequences,
            beam_scores=old.ended_scores,
            topk_log_probs=self.scores,
            beam_indices=old.ended_indices,
            topk_running_beam_indices=self.indices,
            is_early_stop_heuristic_unsatisfied=old.improvable,
            is_sent_finished=old.is_ended,
            next_token_hits_stopping_criteria=ends,
            top_num_beam_mask=torch.arange(ends.shape[1], device=ends.device) < rules.num_beams,
            num_beams=rules.num_beams,
            cur_len=old.length,
            decoder_prompt_len=rules.prompt_length,
            length_penalty=rules.length_penalty,
            early_stopping=rules.early_stopping,
        )
        improvable = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=old.improvable,
            running_beam_scores=running_scores,
            beam_scores=ended_scores,
            is_sent_finished=is_ended,
            cur_len=old.length + 1,
            max_length=rules.max_length,
            decoder_prompt_len=rules.prompt_length,
            early_stopping=rules.early_stopping,
            length_penalty=rules.length_penalty,
        )
        goes_on = model._beam_search_has_unfinished_sequences(improvable, is_ended, ends, rules.early_stopping)
        beams = replace(
            old,
            running=running,
            running_scores=running_scores,
            running_indices=running_indices,
            ended=ended,
            ended_scores=ended_scores,
            ended_indices=ended_indices,
            is_ended=is_ended,
            improvable=improvable,
            length=old.length + 1,
        )
        parents = running_indices[0, :, old.length - rules.prompt_length].long()
        return beams, parents, running[0, :, old.length], ~goes_on


def top_candidates(logits: Tensor, number: int) -> Tensor:
    """
    The most likely tokens, the lower id first among equals, on any device.

    Parameters
    ----------
    logits
        ``[R, vocabulary]``.
    number
        How many; all where the vocabulary is smaller.

    Returns
    -------
    Tensor
        ``[R, number]`` long.
    """
    vocabulary = logits.shape[-1]
    number = min(number, vocabulary)
    least = logits.topk(number, dim=-1).values[:, -1:]
    # topk breaks ties differently on every device: those at the end of the list go by their id.
    ids = torch.arange(vocabulary, device=logits.device)
    rank = torch.where(logits > least, 2 * vocabulary, torch.where(logits == least, vocabulary - ids, -1))
    chosen = rank.topk(number, dim=-1).indices.sort(dim=-1).values
    return chosen.gather(1, logits.gather(1, chosen).sort(dim=-1, descending=True, stable=True).indices)
