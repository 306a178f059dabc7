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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks.methods.base import Method

__all__ = ["ModelIdentity", "answer_key", "digest", "folder_revision", "image_digest", "item_seed"]

# A weight file up to this size is read whole; of a larger one the ends and the length must do, or a run on a 15 GB
# model would begin with a minute of hashing.
_WHOLE_FILE_BYTES = 64 << 20
_END_BYTES = 1 << 20


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


def folder_revision(folder: Path) -> str:
    """Digest of the configuration and weights in a local model folder: what a commit hash is to a hub model."""
    state = hashlib.sha256()
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.jinja"))):
        if path.name == "metrics.json":
            continue  # evaluation results lie beside the weights of bundled models and are not part of the model
        size = path.stat().st_size
        state.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            if size <= _WHOLE_FILE_BYTES:
                state.update(stream.read())
            else:
                state.update(stream.read(_END_BYTES))
                stream.seek(-_END_BYTES, 2)
                state.update(stream.read())
    return f"sha256:{state.hexdigest()[:32]}"


@dataclass(frozen=True)
class ModelIdentity:
    """
    The model side of an answer's identity.

    Parameters
    ----------
    model
        What the recipe names.
    revision
        Commit hash of a hub model, digest of a local folder, ``"unknown"`` for one that was built in memory.
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
        where = Path(model.name_or_path or "")
        revision = getattr(model.config, "_commit_hash", None)
        if revision is None:
            revision = folder_revision(where) if model.name_or_path and where.is_dir() else "unknown"
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
