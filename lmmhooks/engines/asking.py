"""A question that the model answers before a prompt is read, for methods whose branches show what it said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lmmhooks.engines.branch_cache import BranchCache
from lmmhooks.engines.branch_features import image_pixels
from lmmhooks.engines.branch_vision import BranchEncoder, entries_of
from lmmhooks.engines.branches import PromptStacker
from lmmhooks.engines.stacked_prompt import StackedPrompt
from lmmhooks.methods.decoding.base import Branch, DecodingMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["PromptAsker"]

#: Replies that are kept, so that questions about one image cost one reply.
NUM_KEPT = 256


class PromptAsker:
    """
    Lets the model answer a reading of a prompt greedily.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    method, branch
        Who asks, and the reading.
    max_new_tokens
        Longest reply.
    encoder
        That noted the encoder calls of prompts.
    run
        Runs a forward of these rows alone and returns its logits.
    """

    def __init__(
        self,
        runtime: Runtime,
        method: DecodingMethod,
        branch: Branch,
        max_new_tokens: int,
        encoder: BranchEncoder,
        run: Callable[[dict[str, Any]], Tensor],
    ) -> None:
        self.runtime = runtime
        self.max_new_tokens = max_new_tokens
        self.stacker = PromptStacker(runtime, method, [branch], encoder)
        self._run = run
        self._known: dict[bytes, Tensor] = {}

    def ask(self, encoded: dict[str, Any]) -> list[Tensor]:
        """
        Replies, long ``[n_b]`` without the end token, one per row.

        Parameters
        ----------
        encoded
            Arguments of the forward that is about to read the prompt, images encoded.
        """
        stacked = self.stacker.stack({**encoded, "past_key_values": None, "use_cache": True}, with_main=False)
        keys = self._keys(stacked, encoded["mm_encoder_outputs"])
        if any(key not in self._known for key in keys):
            replies = self._generate(stacked, encoded)
            self._known.update(zip(keys, replies, strict=True))
            for key in list(self._known)[: max(len(self._known) - max(NUM_KEPT, len(keys)), 0)]:
                del self._known[key]
        return [self._known[key] for key in keys]

    def _generate(self, stacked: StackedPrompt, encoded: dict[str, Any]) -> list[Tensor]:
        family = self.runtime.family
        cache = BranchCache(DynamicCache(config=family.text_config), 1, stacked.mask, stacked.next_position)
        self.runtime.prepared = (stacked.layout, stacked.vision)
        kwargs = {**stacked.kwargs, "past_key_values": cache, "logits_to_keep": 1}
        logits = self._run(self.stacker.hand_over(kwargs, encoded))
        cache.prompt_read()
        ends = self._ends(logits.device)
        # What is said may stand in a prompt again, in which these would stand for images.
        images = torch.tensor(family.visual_ids, device=logits.device)
        said: list[Tensor] = []
        done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        while len(said) < self.max_new_tokens and not bool(done.all()):
            token = logits[:, -1].index_fill(1, images, -torch.inf).argmax(dim=-1)
            done = done | torch.isin(token, ends)
            said.append(token.masked_fill(done, -1))
            if len(said) < self.max_new_tokens:
                mask, positions = cache.continuation(1)
                step = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": positions}
                logits = self._run({**step, "past_key_values": cache, "logits_to_keep": 1})
        return [row[row >= 0] for row in torch.stack(said, dim=1)]

    def _ends(self, device: torch.device) -> Tensor:
        ids = self.runtime.family.model.generation_config.eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return torch.tensor(ids, dtype=torch.long, device=device)

    def _keys(self, stacked: StackedPrompt, outputs: Mapping[str, Any]) -> list[bytes]:
        """What a reply depends on, by row: its tokens and the pixels of its images, or features without pixels."""
        tokens = stacked.kwargs["input_ids"].cpu()
        visions = {vision.modality: vision for vision in stacked.vision}
        digests = []
        for row, ids in enumerate(tokens):
            digest = hashlib.blake2b(ids[stacked.layout.valid[row].cpu()].numpy().tobytes(), digest_size=16)
            for span in stacked.layout.spans_of(row):
                if visions[span.modality].kwargs:
                    seen = [image_pixels(self.runtime.family, visions[span.modality], span.source)]
                else:
                    seen = [features for features, *_ in entries_of(outputs[span.modality])]
                for tensor in seen:
                    digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
            digests.append(digest.digest())
        return digests
