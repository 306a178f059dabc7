"""Arguments of a forward that reads a prompt: images encoded, and handed over as the model takes them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.compat import pixels_argument, takes_encoder_outputs
from lmmhooks.engines.branch_rows import grids_of, tokens_of
from lmmhooks.engines.branch_vision import BranchEncoder
from lmmhooks.errors import PromptError
from lmmhooks.layout import build_layout
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.vision import ENCODERS, PIXELS, VisionInputs

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["PromptInputs"]


class PromptInputs:
    """What has to be known of a forward's arguments before its prompt is read in several branches."""

    def __init__(
        self, runtime: Runtime, method: DecodingMethod, branches: Sequence[Branch], encoder: BranchEncoder
    ) -> None:
        self.runtime = runtime
        self.family = runtime.family
        self.method = method
        self.branches = list(branches)
        self.encoder = encoder
        self._in_kwargs = takes_encoder_outputs(self.family.model)

    def encode(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        Arguments of a forward with its images encoded, as ``generate`` does before its loop.

        The features are in ``mm_encoder_outputs``, whether the model's forward knows that argument or not: `hand_over`
        sees to that.
        """
        outputs = dict(kwargs.get("mm_encoder_outputs") or {})
        taken: set[str] = set()
        for modality, name in ENCODERS.items():
            encoder = getattr(self.family.core, name, None)
            if encoder is None:
                continue
            names = {*inspect.signature(encoder).parameters, "image_sizes"} - {"kwargs"}
            taken.update({*names, PIXELS[modality]} & kwargs.keys())
            if kwargs.get(PIXELS[modality]) is not None:
                shared = names - set(PIXELS.values())
                arguments = {key: kwargs[key] for key in shared if kwargs.get(key) is not None}
                arguments[pixels_argument(modality, names)] = kwargs[PIXELS[modality]]
                outputs[modality] = encoder(**arguments, return_dict=True)
        left = {key: value for key, value in kwargs.items() if key not in taken}
        return {**left, "mm_encoder_outputs": outputs}

    def hand_over(self, kwargs: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Any]:
        """
        Arguments the model's forward takes: features if it knows them, else pixels, and features when it encodes those.

        Parameters
        ----------
        kwargs
            Of the coming forward, with the features it is to use.
        encoded
            What `encode` made of the arguments of the caller.
        """
        outputs = kwargs.pop("mm_encoder_outputs", None) or {}
        if self._in_kwargs:
            return {**kwargs, "mm_encoder_outputs": outputs} if outputs else kwargs
        self.encoder.ready = dict(outputs)
        for modality in outputs:
            record = self.encoder.record_of(encoded["mm_encoder_outputs"][modality])
            assert record is not None, "a model whose forward takes no features cannot have been given any"
            arguments = dict(record.arguments)
            arguments[PIXELS[modality]] = arguments.pop(pixels_argument(modality, arguments))
            kwargs = {**arguments, **kwargs}
        return kwargs

    def check(self, kwargs: dict[str, Any]) -> None:
        """
        Refuse a prompt that some branch cannot be made from, before anything runs.

        Parameters
        ----------
        kwargs
            From `encode`.

        Raises
        ------
        PromptError
            Tokens or mask of a form that cannot be stacked, images or their pixels missing.
        """
        input_ids, mask = tokens_of(kwargs)
        outputs: dict[str, Any] = kwargs["mm_encoder_outputs"]
        marks = [i for i in (self.family.image_token_id, self.family.video_token_id) if i is not None]
        visual = torch.isin(input_ids, torch.tensor(marks, device=input_ids.device)) & mask
        if not outputs and bool(visual.any()):
            raise PromptError(
                "the prompt has image tokens but no image was given; pass pixel_values beside input_ids, as the "
                "model's processor returns them"
            )
        if not any(branch.needs_image for branch in self.branches):
            return
        bare = (~visual.any(dim=1)).nonzero().flatten().tolist()
        if bare:
            raise PromptError(
                f"{self.method.id} contrasts images, but row {bare[0]} of {len(mask)} has none; "
                "give every prompt an image, or run text-only prompts inside patch.disabled()"
            )
        for modality, output in outputs.items():
            if self.encoder.variants and self.encoder.record_of(output) is None:
                raise PromptError(
                    f"{modality} features were encoded before {self.method.id} was attached, so the pixels of its "
                    "branches are not known; pass pixel_values instead of mm_encoder_outputs"
                )

    def positions(self, kwargs: dict[str, Any]) -> Tensor:
        """
        Positions ``[..., B, N]`` of the main rows of a prompt that they read alone.

        Parameters
        ----------
        kwargs
            From `encode`, which took away what a model would count positions of images by.
        """
        input_ids, mask = tokens_of(kwargs)
        if kwargs.get("position_ids") is not None:
            return self._expanded(kwargs["position_ids"], mask)
        visions = {}
        for modality, output in kwargs["mm_encoder_outputs"].items():
            record = self.encoder.record_of(output)
            visions[modality] = record.as_given(output) if record else VisionInputs(modality, {}, output)
        layout = build_layout(input_ids, mask, self.family, list(visions.values()))
        return self.family.position_ids(input_ids, mask, **grids_of(kwargs, layout, visions))

    def _expanded(self, given: Tensor, mask: Tensor) -> Tensor:
        """Positions of a caller for all rows and axes."""
        given = given.expand(*given.shape[:-2], *mask.shape)
        if self.family.mrope and given.ndim == 2:
            return given.expand(4, -1, -1)
        if self.family.mrope and given.shape[0] == 3:
            return torch.cat([(mask.long().cumsum(dim=1) - 1).clamp(min=0)[None].to(given), given])
        return given
