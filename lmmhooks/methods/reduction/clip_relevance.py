"""How much patches of a CLIP tower match a text, by the text tower of the same checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmmhooks.errors import MethodError

__all__ = ["ClipMatcher", "check_clip_folder"]


def check_clip_folder(method_id: str, folder: str, width: int) -> None:
    """
    Refuse a folder that holds no CLIP model with vision features of a width.

    Raises
    ------
    MethodError
        With what was found.
    """
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise MethodError(
            f"{method_id}: clip={folder!r} is no checkpoint folder (no config.json); give a local folder of the CLIP "
            "model that the vision tower comes from, such as openai/clip-vit-large-patch14-336"
        )
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "clip":
        raise MethodError(f"{method_id}: clip={folder!r} holds a model of type {config.model_type!r}, not a CLIP model")
    if (found := config.vision_config.hidden_size) != width:
        raise MethodError(
            f"{method_id}: clip={folder!r} has a vision tower of width {found}, the model's has {width}; give the "
            "checkpoint that the model's tower comes from"
        )


class ClipMatcher:
    """
    Text tower and projections of a CLIP checkpoint, in float32.

    Parameters
    ----------
    folder
        Local checkpoint with tokenizer.
    device
        Where texts and patches are compared.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # The vision layers, two thirds of the weights, have run in the model itself.
        self.text_model: Any = model.text_model.to(device)
        self.text_projection: Any = model.text_projection.to(device)
        self.norm: Any = model.vision_model.post_layernorm.to(device)
        self.visual_projection: Any = model.visual_projection.to(device)
        self.segment: int = model.config.text_config.max_position_embeddings
        self._texts: tuple[str, ...] = ()
        self._embedded: list[Tensor] = []

    @torch.no_grad()
    def similarity(self, patches: Tensor, texts: Sequence[str]) -> Tensor:
        """
        Cosine of every patch and the text of its row, mean over the text's segments.

        Parameters
        ----------
        patches
            ``[B, N, C]``: outputs of the vision tower's penultimate layer.
        texts
            B of them.

        Returns
        -------
        Tensor
            ``[B, N]`` float32.
        """
        image = torch.nn.functional.normalize(self.visual_projection(self.norm(patches.float())), dim=2)
        if tuple(texts) != self._texts:
            # Crops of different shape ask one after the other about the same texts.
            known = {text: self._embed(text) for text in dict.fromkeys(texts)}
            self._texts, self._embedded = tuple(texts), [known[text] for text in texts]
        rows = zip(image, self._embedded, strict=True)
        return torch.stack([(row @ text.T).mean(dim=1) for row, text in rows])

    def _embed(self, text: str) -> Tensor:
        """
        ``[M, E]``: an embedding of unit length per segment of the tower's length, zeros filling up the last.

        Every segment is pooled where the checkpoint pools a text: at its end token, or its largest token without one.
        """
        ids = torch.tensor([self.tokenizer(text, verbose=False)["input_ids"]])
        rest = -ids.shape[1] % self.segment
        device = self.text_projection.weight.device
        padded = [torch.nn.functional.pad(part, (0, rest)) for part in (ids, torch.ones_like(ids))]
        segments, mask = (part.view(-1, self.segment).to(device) for part in padded)
        pooled = self.text_model(input_ids=segments, attention_mask=mask).pooler_output
        return torch.nn.functional.normalize(self.text_projection(pooled), dim=1)
