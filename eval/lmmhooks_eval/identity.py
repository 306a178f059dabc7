"""
What makes an answer *this* answer: a digest over everything that can change it, the methods with all their settings
included.

Harnesses that build their cache key from model arguments alone hand a patched run the baseline's answers; here the
methods are part of the key ("none" for the baseline), and so are the image, the rendered prompt, the processor and
the chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks.methods.base import Method

__all__ = ["ModelIdentity", "answer_key", "digest", "image_digest", "item_seed"]


def digest(data: Any) -> str:
    """SHA-256 of JSON data in canonical form (sorted keys, no spaces), in hexadecimal."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def image_digest(images: Sequence[Image]) -> str:
    """Digest of decoded pixels, so that the same picture in another file format is the same picture."""
    state = hashlib.sha256()
    for image in images:
        state.update(f"{image.mode}{image.size}".encode())
        state.update(image.tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class ModelIdentity:
    """
    The model side of an answer's identity.

    Parameters
    ----------
    model
        What the recipe names.
    revision
        Commit hash of a hub model, else a fingerprint of the weights.
    dtype, attention, quantization
        As loaded.
    processor
        Digest of the image processor's settings.
    template
        Digest of the chat template and system message.
    """

    model: str
    revision: str
    dtype: str
    attention: str
    quantization: str
    processor: str
    template: str

    @classmethod
    def of(
        cls,
        name: str,
        model: Any,
        processor: Any,
        *,
        settings: Mapping[str, Any],
        system: str | None,
        quantization: str | None,
    ) -> ModelIdentity:
        """Read the identity from a loaded model and processor; `settings` are the recipe's processor settings."""
        from lmmhooks.loading import identity

        checkpoint = identity(model)
        revision = checkpoint["revision"] or f"fingerprint:{checkpoint['fingerprint']}"
        image_processor = json.loads(processor.image_processor.to_json_string())
        return cls(
            model=name,
            revision=revision,
            dtype=str(model.dtype).removeprefix("torch."),
            attention=str(model.config._attn_implementation),
            quantization=quantization or "none",
            processor=digest([image_processor, dict(settings)]),
            template=digest([processor.chat_template, system]),
        )


def answer_key(
    identity: ModelIdentity,
    methods: Sequence[Method],
    *,
    task: str,
    doc_id: str,
    prompt: str,
    image: str,
    generation: Mapping[str, Any],
    seed: int | None,
) -> str:
    """
    Key under which an answer is stored.

    Parameters
    ----------
    identity
        The model side.
    methods
        The variant's methods in order; none for the baseline.
    task, doc_id
        The document.
    prompt
        The rendered prompt, template included.
    image
        `image_digest` of its images.
    generation
        All arguments of ``generate``.
    seed
        Seed of the run where anything is random; None for a greedy baseline.
    """
    return digest(
        {
            "model": asdict(identity),
            "methods": [{"id": method.id, "settings": method.settings()} for method in methods] or "none",
            "task": task,
            "doc": doc_id,
            "prompt": prompt,
            "image": image,
            "generation": dict(generation),
            "seed": seed,
        }
    )


def item_seed(seed: int, doc_id: str) -> int:
    """Seed of one document, in [0, 2^63): the same whatever the order, the batches or the number of processes."""
    return int(digest([seed, doc_id])[:16], 16) >> 1
