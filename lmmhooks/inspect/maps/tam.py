"""
Token activation maps: what every position of the image would say, freed of what earlier words say there.

"Token Activation Map to Visually Explain Multimodal LLMs" (TAM, ICCV 2025, 2506.23270), code xmed-lab/TAM (MIT). The
score of a position for a token is the positive part of that token's logit there. From the map of a token the
interference of earlier text is taken off: the mean of the maps of earlier tokens that are other tokens, weighted by the
scores of their positions, in the scale of least squares. Then the scores of image and text are normalised together, and
a rank-based filter smooths the cells. Needs no attention.

As in the code, the first text token of the prompt is represented by the token that is most likely at its place. The
code explains the first token of the answer by the last token of the prompt, and returns the map of the prompt's first
token for it; here it is explained by itself (``official=True`` does as the code does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question
from lmmhooks.methods.words import surroundings

__all__ = ["Tam", "activation", "interference", "joint_min_max", "rank_gaussian", "without_interference"]


def interference(maps: Tensor, scores: Tensor) -> Tensor:
    """
    What earlier text says about an image.

    Parameters
    ----------
    maps
        ``[K, n]`` visual scores of K earlier tokens, each for itself.
    scores
        ``[K]`` scores of their positions for the token that is explained, at least 0.

    Returns
    -------
    Tensor
        ``[n]`` mean of the maps, weighted by the scores.
    """
    weights = scores / (scores.sum() + 1e-8)
    return (maps * weights[:, None]).sum(dim=0)


def without_interference(values: Tensor, disturbing: Tensor) -> Tensor:
    """
    Positive part of a map ``[n]`` less the interference ``[n]``, scaled so that the squared difference is least.

    Estimated causal inference; the scale is ``<m, b> / <b, b>``, which the released code searches numerically.
    """
    power = disturbing @ disturbing
    scale = (values @ disturbing) / power if power > 0 else torch.zeros_like(power)
    return (values - scale * disturbing).clamp(min=0)


def joint_min_max(visual: Tensor, text: Tensor) -> Tensor:
    """Visual scores ``[n]`` in the range of visual and text scores together: 0 the least, 1 the most; 0 if equal."""
    both = torch.cat([visual, text])
    low, high = both.min(), both.max()
    return (visual - low) / (high - low) if high > low else torch.zeros_like(visual)


def rank_gaussian(grid: Tensor, size: int = 3) -> Tensor:
    """
    Smooth a map by the ranks of its neighbourhoods.

    Every window is sorted, and its values averaged with Gaussian weights over ranks, centred on the median; their width
    is the window's standard deviation over its mean, so that even neighbourhoods become medians and uneven ones means.

    Parameters
    ----------
    grid
        ``[rows, columns]``, at least 0.
    size
        Side of the window, odd; borders are reflected.

    Returns
    -------
    Tensor
        float64 ``[rows, columns]``. 0 for windows of mean 0. A window of equal values gives that value, where the
        released code divides 0 by 0.
    """
    padded = np.pad(grid.detach().double().cpu().numpy(), size // 2, mode="reflect")
    windows = np.sort(sliding_window_view(padded, (size, size)).reshape(*grid.shape, size * size), axis=-1)
    mean, spread = windows.mean(axis=-1), windows.std(axis=-1)
    ranks = np.arange(size * size) - size * size // 2
    width = np.divide(spread, mean, out=np.zeros_like(mean), where=mean > 0)[..., None]
    # A width of 0 leaves the median alone.
    with np.errstate(over="ignore"):
        exponent = np.divide(ranks**2, 2 * width**2, out=np.where(ranks == 0, 0.0, np.inf) + 0 * width, where=width > 0)
    kernel = np.exp(-exponent)
    smooth = (windows * kernel).sum(axis=-1) / kernel.sum(axis=-1)
    return torch.from_numpy(np.where(mean > 0, smooth, 0.0))


@dataclass(frozen=True)
class Tam(MapKind):
    """
    Token activation maps.

    Attributes
    ----------
    official
        Explain the first token of the answer as the released code does.
    window
        Side of the filter's window in cells, odd; 1 leaves it out.
    """

    official: bool = False
    window: int = 3

    id: ClassVar[str] = "tam"
    uses_layers: ClassVar[bool] = False
    reads_states: ClassVar[bool] = True
    paper: ClassVar[str] = "TAM, ICCV 2025 (2506.23270)"

    def __post_init__(self) -> None:
        self._require(self.window >= 1 and self.window % 2 == 1, "window", "an odd number from 1 on")

    def values(self, question: Question) -> Tensor:
        words, places = self._text(question)
        with torch.no_grad():
            scores = self._scores(question, words, places)
        visual = scores[:, question.positions]
        gone = visual.isnan().any(dim=0)
        visual = visual.masked_fill(gone, 0.0)
        text = scores[:, places].nan_to_num(0.0)
        num_prompt = len(words) - len(question.answered.new_ids)
        found = []
        for t in question.rows:
            # The released code returns the map of the prompt's first token for that of the answer.
            k = 0 if self.official and t == 0 else num_prompt + t
            values = activation(visual, text[k], words, k, num_prompt)
            smooth = torch.full((visual.shape[1],), torch.nan)
            for grid in question.geometry.grids:
                cells = torch.cat([values, values.new_zeros(1)])[grid.index]
                filtered = rank_gaussian(cells, self.window) if self.window > 1 else cells
                there = grid.index >= 0
                smooth[grid.index[there]] = filtered[there].float()
            found.append(smooth.masked_fill(gone, torch.nan))
        return torch.stack(found)

    def _text(self, question: Question) -> tuple[list[int], Tensor]:
        """
        Tokens that have a map, in order, and the position at which each is scored.

        Of the prompt the text after the image, without what the chat template writes around it, at its own positions;
        of the answer every token, at the position that chooses it.
        """
        answered, length = question.answered, question.prompt_length
        start = max(span.stop for span in answered.layout.spans_of(0))
        ids = list(answered.prompt_ids[start:])
        head, tail = surroundings(question.passes.processor.tokenizer, ids)
        prompt = range(start + head, max(length - tail, start + head))
        answer = range(length - 1, length - 1 + len(answered.new_ids))
        words = [answered.prompt_ids[place] for place in prompt] + list(answered.new_ids)
        return words, torch.tensor([*prompt, *answer])

    def _scores(self, question: Question, words: Sequence[int], places: Tensor) -> Tensor:
        """``[K, positions]``: for every token with a map the positive part of its logit at every position."""
        answered, family = question.answered, question.family
        assert answered.states is not None, "asked for by the kind"
        states = answered.states.to(next(family.lm_head.parameters()).dtype)
        classes, num_prompt = list(words), len(words) - len(answered.new_ids)
        if num_prompt:
            classes[0] = int(family.token_logits(states[places[0]]).argmax())
        if self.official:
            classes[num_prompt] = answered.prompt_ids[-1]
        return family.token_logits(states, torch.tensor(classes)).T.clamp(min=0).cpu()


def activation(visual: Tensor, text: Tensor, words: Sequence[int], k: int, num_prompt: int) -> Tensor:
    """
    The map of a token before it is smoothed.

    Parameters
    ----------
    visual
        ``[K, n]`` visual scores of all tokens with a map, each for itself.
    text
        ``[K]`` scores of their positions for token k.
    words
        The tokens.
    k
        Which of them.
    num_prompt
        How many of them belong to the prompt.

    Returns
    -------
    Tensor
        ``[n]`` in [0, 1].
    """
    values = visual[k]
    earlier = [i for i in range(k) if words[i] != words[k]]
    if earlier:
        values = without_interference(values, interference(visual[earlier], text[earlier]))
    # The scores of text that was there: the whole prompt, and the answer up to the position that chooses the token.
    return joint_min_max(values, text[: max(k, num_prompt)])
