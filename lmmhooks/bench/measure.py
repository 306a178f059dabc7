"""What a benchmark measures for one model: every method against the plain model, its theory and its limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lmmhooks.bench.branching import naive_loop, read_branches, suffix_pass
from lmmhooks.bench.memory import peak_bytes
from lmmhooks.bench.passes import Pass, native_decoder_pass, searched_pass, timed_pass
from lmmhooks.bench.prompts import Prompt
from lmmhooks.bench.timing import Spread, interleave, paired_ratio, spread
from lmmhooks.family import Family, resolve
from lmmhooks.methods.base import Method
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.patch import Patch, wrap

__all__ = ["BaselineCost", "VariantCost", "measure_baseline", "measure_disabled", "measure_variant"]

SPANS = ("vision", "decoder", "prefill", "decode")


@dataclass(frozen=True)
class BaselineCost:
    """
    The plain model.

    Attributes
    ----------
    milliseconds
        Per span of :class:`~lmmhooks.bench.passes.Pass`.
    peak_bytes
        Memory of the prefill beyond the weights.
    """

    milliseconds: dict[str, Spread]
    peak_bytes: int


@dataclass(frozen=True)
class VariantCost:
    """
    A patched model against the plain one, in the same rounds.

    Attributes
    ----------
    methods
        Specifications of the methods, composed in this order.
    kinds
        Their kinds.
    milliseconds
        Per span.
    ratios
        Per span, time over the plain model's.
    over_limit
        Decoder prefill time over the native limit: the unpatched decoder timed at each layer's own length, one layer's
        share each. None where no token is removed.
    over_suffixes
        Decoder prefill over the least that branches have to read: the prompt, and of each branch what it does not have
        in common with it, read one after the other. None without branches.
    over_naive
        Decode step over that of the naive loop, in which every branch has a cache and a forward of its own. None
        without branches, and under beam search.
    average_visual
        Visual tokens entering a decoder layer, averaged over layers and rows.
    visual_kept
        Visual tokens entering each decoder layer (first row).
    kv_ratio
        Cache bytes after the prefill over the plain model's.
    flops_ratio
        Theoretical decoder prefill FLOPs over the plain model's (square pairs), all branches counted.
    branches
        Rows of the forward per row of the batch: 1 without decoding branches.
    peak_bytes, peak_bytes_plain
        Memory of the prefill beyond the weights, patched and plain.
    """

    methods: list[str]
    kinds: list[str]
    milliseconds: dict[str, Spread]
    ratios: dict[str, Spread]
    over_limit: Spread | None
    over_suffixes: Spread | None
    over_naive: Spread | None
    average_visual: float
    visual_kept: list[int]
    kv_ratio: float
    flops_ratio: float
    branches: int
    peak_bytes: int
    peak_bytes_plain: int


def measure_baseline(
    model: PreTrainedModel, prompt: Prompt, repeat: int, decode_tokens: int, num_beams: int = 1
) -> BaselineCost:
    """Measure the plain model alone."""
    family = resolve(model)
    passes = interleave({"plain": _answer(family, prompt, decode_tokens, num_beams)}, repeat)["plain"]
    return BaselineCost(_milliseconds(passes), _prefill_peak(family, prompt))


def measure_disabled(
    model: PreTrainedModel,
    prompt: Prompt,
    methods: Sequence[str | Method],
    repeat: int,
    decode_tokens: int,
    num_beams: int = 1,
) -> dict[str, Spread]:
    """
    Measure a wrapped model whose patch is disabled against the model without any patch.

    Returns
    -------
    dict
        Per span, time over the unwrapped model's.
    """
    family = resolve(model)
    # The bound methods carry what wrapping measured, so that wrapping again costs nothing.
    with wrap(model, *methods) as patch:
        bound = patch.methods
    answer = _answer(family, prompt, decode_tokens, num_beams)

    def disabled() -> Pass:
        with wrap(model, *bound) as patch, patch.disabled():
            return answer()

    passes = interleave({"plain": answer, "disabled": disabled}, repeat)
    return _ratios(passes["disabled"], passes["plain"])


def measure_variant(
    model: PreTrainedModel,
    prompt: Prompt,
    methods: Sequence[str | Method],
    repeat: int,
    decode_tokens: int,
    num_beams: int = 1,
) -> VariantCost:
    """
    Measure a model with methods against the same model without.

    Parameters
    ----------
    model
        An unwrapped model.
    prompt
        Its inputs.
    methods
        Methods composed into one patch.
    repeat
        Rounds that count.
    decode_tokens
        Decode steps per round; under beam search, tokens per answer.
    num_beams
        With 2 or more, prompts are answered by the beam search of ``generate``, and decode steps are those of plain
        beam search with as many beams.

    Returns
    -------
    VariantCost

    Raises
    ------
    LmmhooksError
        A method that cannot be used on this model.
    """
    with wrap(model, *methods) as patch:
        family = patch.family
        timed_pass(family, prompt)
        stats = patch.stats
        kept = [layer.visual_kept[0] for layer in stats.layers]
        reduced = num_beams == 1 and any(count != prompt.visual for count in kept)
        branching = next((m for m in patch.methods if isinstance(m, DecodingMethod) and m.branches(family)), None)

        answer = _answer(family, prompt, decode_tokens, num_beams)
        actions: dict[str, Callable[[], Any]] = {"plain": _plain(patch, answer), "patched": answer}
        lengths = sorted({prompt.text + count for count in kept}) if reduced else []
        for length in lengths:
            actions[f"native {length}"] = _plain(patch, _native(family, prompt.batch * stats.branches, length))
        if branching is not None and num_beams == 1:
            readings = read_branches(family, branching, prompt)
            actions["suffixes"] = _plain(patch, lambda: suffix_pass(family, readings))
            if decode_tokens:
                with patch.disabled():
                    actions["naive"] = _plain(patch, naive_loop(family, readings, decode_tokens))

        results = interleave(actions, repeat)
        plain, patched = results["plain"], results["patched"]
        over_limit = over_suffixes = over_naive = None
        if reduced:
            share = {length: [value / len(kept) for value in results[f"native {length}"]] for length in lengths}
            limits = [sum(share[prompt.text + count][number] for count in kept) for number in range(repeat)]
            over_limit = paired_ratio([one.decoder for one in patched], limits)
        if "suffixes" in results:
            over_suffixes = paired_ratio([one.decoder for one in patched], results["suffixes"])
        if "naive" in results:
            over_naive = paired_ratio([one.decode for one in patched], results["naive"])
        peak = _prefill_peak(family, prompt)
        with patch.disabled():
            peak_plain = _prefill_peak(family, prompt)
        return VariantCost(
            methods=[method.spec() for method in patch.methods],
            kinds=[method.kind for method in patch.methods],
            milliseconds=_milliseconds(patched),
            ratios=_ratios(patched, plain),
            over_limit=over_limit,
            over_suffixes=over_suffixes,
            over_naive=over_naive,
            average_visual=stats.average_visual,
            visual_kept=kept,
            kv_ratio=stats.kv_bytes / stats.kv_bytes_full,
            flops_ratio=stats.prefill_flops / stats.prefill_flops_full,
            branches=stats.branches,
            peak_bytes=peak,
            peak_bytes_plain=peak_plain,
        )


def _answer(family: Family, prompt: Prompt, decode_tokens: int, num_beams: int) -> Callable[[], Pass]:
    if num_beams > 1:
        return lambda: searched_pass(family, prompt, num_beams, decode_tokens)
    return lambda: timed_pass(family, prompt, decode_tokens)


def _plain(patch: Patch, run: Callable[[], Any]) -> Callable[[], Any]:
    def without_patch() -> Any:
        with patch.disabled():
            return run()

    return without_patch


def _native(family: Family, batch: int, tokens: int) -> Callable[[], float]:
    return lambda: native_decoder_pass(family, batch, tokens)


def _prefill_peak(family: Family, prompt: Prompt) -> int:
    inputs = {name: value for name, value in prompt.inputs.items() if name != "attention_mask"}

    @torch.no_grad()
    def run() -> None:
        family.model(**inputs, use_cache=True, logits_to_keep=1)

    return peak_bytes(run, family.model.device)


def _spans(passes: Sequence[Pass]) -> dict[str, list[float]]:
    spans = {name: [getattr(one, name) for one in passes] for name in SPANS}
    return {name: values for name, values in spans.items() if all(values)}


def _milliseconds(passes: Sequence[Pass]) -> dict[str, Spread]:
    return {name: spread(values) for name, values in _spans(passes).items()}


def _ratios(passes: Sequence[Pass], references: Sequence[Pass]) -> dict[str, Spread]:
    ours, theirs = _spans(passes), _spans(references)
    return {name: paired_ratio(ours[name], theirs[name]) for name in ours}
