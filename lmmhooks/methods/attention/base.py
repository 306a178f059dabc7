"""
Contract of attention methods.

Shapes: B rows of the batch, H query heads, R edited query rows, N keys, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import pad

from lmmhooks.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.layout import Layout
    from lmmhooks.methods.probe import Probe
    from lmmhooks.methods.prompt import PromptContext

__all__ = ["AttentionContext", "AttentionMethod", "SegmentMethod"]

STEPS = ("scale_keys", "edit_scores", "edit_weights", "scale_heads")


@dataclass
class AttentionContext:
    """
    What an attention method may look at during one attention call.

    Attributes
    ----------
    layer
        Index of the decoder layer, 0-based.
    family
        The resolved model family.
    layout
        Layout of the keys of this call: its masks are ``[B, N]`` and already cover cached and generated positions.
    rows
        ``[B, R]`` indices of the edited query rows among the queries of this call.
    is_prefill
        True for the forward that reads the prompt.
    memory
        Dictionary private to the method and emptied at every new prompt.
    num_cached
        Keys that were there before the queries of this call; 0 while the prompt is read.
    prompt_length
        Columns of the prompt as given, before any reduction.
    keys
        ``[B, Hkv, N, d]`` after rotary embedding; not to be changed. None in `AttentionMethod.observe`.
    scaling
        Factor on the dot products.
    index
        ``[B, N]`` position of every key in the prompt as given, -1 for padding and for tokens that came later; None
        where nothing was removed from the prompt.
    weights_of
        Rows ``[B, R]`` of this call, edited or not, to the weights ``[B, H, R, N]`` float32 they have without any edit
        in this layer. Computed anew at every call of it; None where there are no ``keys``.
    """

    layer: int
    family: Any
    layout: Layout
    rows: Tensor
    is_prefill: bool
    memory: dict[Any, Any]
    num_cached: int = 0
    prompt_length: int = 0
    keys: Any = None
    scaling: float = 1.0
    index: Tensor | None = None
    weights_of: Any = None

    @property
    def positions(self) -> Tensor:
        """``[B, R]`` which key of this call each edited row is."""
        return self.rows + self.num_cached

    def globalize(self, values: Tensor, fill: float = 0) -> Tensor:
        """
        Values per key of this call as values per position of the prompt: the reverse of `localize`.

        Parameters
        ----------
        values
            ``[B, ..., N]``; what tokens hold that came after the prompt is left out.
        fill
            For positions that a reduction has removed.

        Returns
        -------
        Tensor
            ``[B, ..., N0]``, one per position of the prompt as given.
        """
        if self.index is None:
            return values[..., : self.prompt_length]
        index = self.index.to(values.device)
        # One column more takes what padding writes.
        index = index.masked_fill(index < 0, self.prompt_length).view(
            index.shape[0], *[1] * (values.dim() - 2), index.shape[1]
        )
        room = values.new_full((*values.shape[:-1], self.prompt_length + 1), fill)
        known = values[..., : index.shape[-1]]
        return room.scatter(-1, index.expand_as(known), known)[..., :-1]

    def localize(self, values: Tensor, fill: float = 0) -> Tensor:
        """
        Values per prompt position as values per key of this call.

        Parameters
        ----------
        values
            ``[B, ..., N0]``, one per position of the prompt as given, before any reduction.
        fill
            For padding and for tokens that came after the prompt.

        Returns
        -------
        Tensor
            ``[B, ..., N]``.
        """
        if self.index is not None:
            index = self.index.to(values.device)
            shape = (index.shape[0], *[1] * (values.dim() - 2), index.shape[1])
            picked = values.gather(-1, index.clamp(min=0).view(shape).expand(*values.shape[:-1], -1))
            values = picked.masked_fill((index < 0).view(shape), fill)
        return pad(values, (0, self.layout.length - values.shape[-1]), value=fill)


@dataclass(frozen=True)
class AttentionMethod(Method):
    """
    Edits attention in decoder layers.

    The engine runs the model's own attention backend for all rows and recomputes the edited rows exactly. Per layer and
    call it applies, in this order: ``scale_keys``, ``edit_scores``, softmax in float32, ``edit_weights``, the product
    with the values, ``scale_heads``. Override only what the method does. With several methods on a layer each step runs
    for all of them in the order in which they were given to ``wrap``.
    """

    kind: ClassVar[str] = "attention"
    rows: ClassVar[str] = "after_image"
    """
    Edited rows of the prompt: ``"after_image"`` (text with a visual token before it), ``"last"``, ``"instruction"``
    (text after the first visual token, all of it without an image) or ``"all"``.
    """
    on_decode: ClassVar[bool] = True
    """Whether rows of generated tokens are edited too."""
    observes: ClassVar[bool] = False
    """Whether :meth:`observe` wants the input of each of its layers at prefill."""

    edits: ClassVar[frozenset[str]] = frozenset()
    """Steps the class defines itself, found when it is created; the engine skips those that no method defines."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.edits = frozenset(step for step in STEPS if getattr(cls, step) is not getattr(AttentionMethod, step))

    @property
    def contrasts_text(self) -> bool:
        """Whether :meth:`choose_heads` wants heads compared with a reading of the prompt without its images."""
        return False

    def layers(self, family: Any) -> Sequence[int]:
        """Decoder layers that are edited, 0-based."""
        return range(family.num_layers)

    # -- before the decoder reads a prompt ----------------------------------------------------------------------------

    def probes(self, family: Any) -> Sequence[Probe]:
        """Signals of the vision tower that :meth:`prepare` reads; ``vision_cls`` and ``vision_received`` only."""
        return ()

    def prepare(self, prompt: PromptContext) -> None:
        """Compute what holds for the whole prompt and keep it in ``prompt.memory``."""

    # -- while the decoder reads a prompt -----------------------------------------------------------------------------

    def observe(self, hidden: Tensor, context: AttentionContext) -> None:
        """
        Look at the input of a layer during prefill, before its norm.

        Parameters
        ----------
        hidden
            ``[B, N, D]`` in the model's dtype; must not be changed.
        context
            ``context.rows`` is empty here.
        """

    def watched(self, family: Any) -> Mapping[int, str]:
        """
        Layers whose attention weights :meth:`watch` wants to see at prefill, each with a row selection as in ``rows``.

        Where all of them lie below the first edited layer they are read on the way; otherwise the engine runs the
        unpatched decoder up to the last of them first.
        """
        return {}

    def watch(self, weights: Tensor, real: Tensor, context: AttentionContext) -> None:
        """
        Look at attention weights of a layer in `watched`; called once per layer and prompt, before any edit.

        Parameters
        ----------
        weights
            ``[B, H, R, N]`` float32; must not be changed.
        real
            ``[B, R]`` bool, False for filler rows of samples that have fewer rows.
        context
            Its ``rows`` are the rows of ``weights``.
        """

    def choose_heads(self, outputs: Tensor, without_image: Tensor, context: AttentionContext) -> Tensor:
        """
        Decide on gains by comparing heads with and without the image, layer by layer while the prompt is read.

        The reading without images advances beside the prompt and gets the same gains, so that each layer is judged on
        inputs that the layers below have already shaped.

        Parameters
        ----------
        outputs, without_image
            ``[B, H, d]`` attention output at the last position, before the output projection.

        Returns
        -------
        Tensor
            Gain ``[B, H]`` for the reading without images; the method keeps it in ``context.memory`` for
            :meth:`scale_heads`, which is called next.
        """
        raise NotImplementedError

    # -- while the answer is generated --------------------------------------------------------------------------------

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        """
        The answer goes on with other rows of the batch, as beam search makes it.

        Only for methods that keep something about generated tokens: what they know of a prompt is the same for all its
        beams.

        Parameters
        ----------
        rows
            ``[B]`` long: the row that each row goes on from.
        memory
            The dictionary that contexts carry.
        """

    # -- edits --------------------------------------------------------------------------------------------------------

    def scale_keys(self, context: AttentionContext) -> Tensor | None:
        """Factors on keys for the edited rows, ``[B, N]`` or ``[B, H, N]`` float32, or None for no change."""
        return None

    def edit_scores(self, scores: Tensor, context: AttentionContext) -> Tensor:
        """
        Change scaled logits ``q k^T / sqrt(d)`` before the softmax.

        Parameters
        ----------
        scores
            ``[B, H, R, N]`` float32; keys a row may not see hold the smallest float32.

        Returns
        -------
        Tensor
            Same shape. May be the input, changed in place.
        """
        return scores

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        """
        Change attention weights after the softmax.

        Parameters
        ----------
        weights
            ``[B, H, R, N]`` float32; rows sum to 1, invisible keys are exactly 0.

        Returns
        -------
        Tensor
            Same shape. May be the input, changed in place.
        """
        return weights

    def scale_heads(self, queries: Tensor, outputs: Tensor, context: AttentionContext) -> Tensor | None:
        """
        Gain per head on the attention output, before the output projection.

        Parameters
        ----------
        queries
            ``[B, H, R, d]`` queries of the edited rows, after rotary embedding.
        outputs
            ``[B, H, R, d]`` attention output of the edited rows.

        Returns
        -------
        Tensor or None
            Gain broadcastable to ``[B, H, R, 1]``, or None for no change.
        """
        return None


@dataclass(frozen=True)
class SegmentMethod(AttentionMethod):
    """
    Reweights a small set of keys against all others in every row: ``w = inside`` on the set, ``outside`` elsewhere.

    The set is chosen per head from the attention that keys receive at prefill, and kept for the rest of the prompt. The
    engine needs no weights for it: with mass ``m`` and output ``O_S`` of the set, the row's output is
    ``outside * O + (inside - outside) * m * O_S``, which costs a few gathered keys instead of all of them.
    """

    rows: ClassVar[str] = "all"

    def edited_heads(self, layer: int, family: Any) -> Sequence[int] | None:
        """Query heads that are edited in a layer; None for all of them."""
        return None

    def choose(self, received: Tensor, seen: Tensor, context: AttentionContext) -> Tensor:
        """
        Choose the set.

        Parameters
        ----------
        received
            ``[B, H', N]`` float32: mean attention of the rows that can see a key, for the edited heads.
        seen
            ``[B, N]`` long: how many rows that is; 0 at padding.

        Returns
        -------
        Tensor
            ``[B, H', N]`` bool.
        """
        raise NotImplementedError

    def factors(self, mass: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """
        Weights of the set and of everything else.

        Parameters
        ----------
        mass
            ``[B, H', R]`` float32 in [0, 1]: attention of a row on the set.
        rest
            The same for everything else: ``1 - mass``, but exact where the set holds nearly all of a row.

        Returns
        -------
        tuple
            ``inside`` and ``outside``, broadcastable to ``[B, H', R]``.
        """
        raise NotImplementedError

    def reweight(self, weights: Tensor, chosen: Tensor) -> Tensor:
        """
        The edit, on explicit weights: what the engine's closed form must agree with.

        Parameters
        ----------
        weights
            ``[B, H', R, N]`` float32 of the edited heads; not changed.
        chosen
            ``[B, H', N]`` bool.
        """
        inset = chosen[:, :, None, :]
        mass, rest = (weights * inset).sum(dim=-1), (weights * ~inset).sum(dim=-1)
        inside, outside = (factor.expand_as(mass)[..., None] for factor in self.factors(mass, rest))
        return weights * torch.where(inset, inside, outside)

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        chosen = self.chosen(context)
        heads = self.edited_heads(context.layer, context.family)
        if heads is None:
            return self.reweight(weights, chosen)
        weights[:, list(heads)] = self.reweight(weights[:, list(heads)], chosen)
        return weights

    def chosen(self, context: AttentionContext) -> Tensor:
        """The set of this layer, ``[B, H', N]`` bool, over all keys of this call."""
        chosen: Tensor = context.memory[context.layer]
        return pad(chosen, (0, context.layout.length - chosen.shape[-1]))
