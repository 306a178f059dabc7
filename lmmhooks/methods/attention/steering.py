"""
Contract of methods that steer hidden states instead of attention weights: MLP outputs, and what the head reads.

They are listed with the attention methods, whose aim they share. Shapes: B rows of the batch, N positions of a forward,
D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.probe import Probe
    from lmmhooks.methods.prompt import PromptContext

__all__ = ["SteeringContext", "SteeringMethod"]

STEPS = ("edit_mlp", "edit_vision_mlp", "read_layer", "mix_output")


@dataclass
class SteeringContext:
    """
    What a steering method may look at in one layer of one forward.

    Attributes
    ----------
    layer
        Decoder layer, 0-based; the number of layers in `SteeringMethod.mix_output`.
    family
        The resolved model family.
    valid
        ``[B, N]`` bool: positions of this forward that are no padding.
    last
        ``[B, 1]`` long: column of the last position of each row.
    is_prefill
        True for the forward that reads the prompt.
    memory
        Dictionary private to the method and emptied at every new prompt.
    logits
        Final norm and language head of the unpatched model, ``[..., D]`` to ``[..., vocabulary]`` float32.
    spread
        Places states ``[B, N, D]`` of this layer over states ``[B, N0, D]`` of the whole prompt, of which a reduction
        may have removed tokens; the second where nothing was placed.
    """

    layer: int
    family: Any
    valid: Tensor
    last: Tensor
    is_prefill: bool
    memory: dict[Any, Any]
    logits: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SteeringMethod(Method):
    """Edits hidden states; the engine calls only the steps that a method defines."""

    kind: ClassVar[str] = "attention"

    steps: ClassVar[frozenset[str]] = frozenset()
    """Steps the class defines itself, found when it is created."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.steps = frozenset(step for step in STEPS if getattr(cls, step) is not getattr(SteeringMethod, step))

    def layers(self, family: Any) -> Sequence[int]:
        """Decoder layers whose MLP output is edited, 0-based."""
        return range(family.num_layers)

    def vision_layers(self, family: Any) -> Sequence[int]:
        """Layers of the vision tower whose MLP output is edited, 0-based."""
        return range(len(family.vision_layers))

    def read_layers(self, family: Any) -> Sequence[int]:
        """Decoder layers whose output :meth:`read_layer` sees, 0-based."""
        return ()

    def probes(self, family: Any) -> Sequence[Probe]:
        """Signals of the vision tower that :meth:`prepare` reads; ``vision_cls`` and ``vision_received`` only."""
        return ()

    def prepare(self, prompt: PromptContext) -> None:
        """Compute what holds for the whole prompt and keep it in ``prompt.memory``."""

    def edit_mlp(self, inputs: Tensor, outputs: Tensor, context: SteeringContext) -> Tensor:
        """
        Change the output of an MLP before it is added to the residual stream.

        Parameters
        ----------
        inputs, outputs
            ``[B, N, D]`` in the model's dtype; not to be changed in place.
        """
        return outputs

    def edit_vision_mlp(self, outputs: Tensor, layer: int, family: Any) -> Tensor:
        """
        The same in the vision tower.

        Parameters
        ----------
        outputs
            ``[crops, patches, D]``, the class token first where the tower has one, or ``[patches, D]`` for towers that
            see packed patches.
        """
        return outputs

    def read_layer(self, hidden: Tensor, context: SteeringContext) -> None:
        """Look at the output ``[B, N, D]`` of a layer in `read_layers`; not to be changed in place."""

    def mix_output(self, normed: Tensor, context: SteeringContext) -> Tensor:
        """Change what the language head reads: the normed output ``[B, N0, D]`` of the decoder."""
        return normed
