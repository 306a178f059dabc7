"""Find and load the bundled models, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lmmhooks_eval.tiny.models import MODELS
from lmmhooks_eval.tiny.processors import build_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_FOLDER = Path(__file__).parent
_NAME_OF_TYPE = {"llava": "tiny-llava", "qwen2_5_vl": "tiny-qwen"}


def data_dir() -> Path:
    """Folder of the frozen benchmark: ``scenes*.jsonl``, ``vocab.json`` and ``images/``."""
    return _FOLDER / "data"


def model_dir(name: str) -> Path:
    """Folder of a bundled model, ready for `from_pretrained`.

    Parameters
    ----------
    name
        ``"tiny-llava"`` or ``"tiny-qwen"``.

    Raises
    ------
    ValueError
        If there is no bundled model of that name.
    FileNotFoundError
        If its weights are not installed.
    """
    if name not in MODELS:
        raise ValueError(f"unknown bundled model {name!r}; choose one of {', '.join(MODELS)}")
    folder = _FOLDER / "weights" / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"weights of {name} are missing in {folder}; reinstall the package or run "
            f"python -m lmmhooks_eval.tiny.train --model {name} --out DIR"
        )
    return folder


def load_processor(folder: str | Path) -> ProcessorMixin:
    """Load the processor of a bundled (or freshly trained) tiny model without torchvision.

    Parameters
    ----------
    folder
        A folder written by training, e.g. ``model_dir("tiny-qwen")``.

    Returns
    -------
    transformers.ProcessorMixin
        `LlavaProcessor` or `Qwen2_5_VLProcessor` (without video processor), PIL image processing, left padding.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type not in _NAME_OF_TYPE:
        raise ValueError(f"{folder} holds a {model_type} model; bundled models are {', '.join(_NAME_OF_TYPE)}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return build_processor(_NAME_OF_TYPE[model_type], tokenizer, image_processor)


def load_model(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a bundled model in float32, in evaluation mode, with its processor.

    Raises
    ------
    ValueError, FileNotFoundError
        As `model_dir`.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    folder = model_dir(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_processor(folder)
