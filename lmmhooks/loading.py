"""Loading a model with its processor by one name, and telling checkpoints apart."""

from __future__ import annotations

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import ModelError, closest
from .processors import load_processor

__all__ = ["BUNDLED", "identity", "load"]

#: Models that come with the evaluation package.
BUNDLED = ("tiny-llava", "tiny-qwen")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_BITS = {"bnb-4bit": "load_in_4bit", "bnb-8bit": "load_in_8bit"}


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = "auto",
    device: Any = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    quantization: Any = None,
) -> tuple[Any, Any]:
    """
    Load a multimodal model, ready to be wrapped, and its processor.

    Parameters
    ----------
    name_or_path
        A bundled model (`BUNDLED`), a local folder, or a hub id such as ``"llava-hf/llava-1.5-7b-hf"``.
    dtype
        Of the weights: a ``torch.dtype``, its name, or ``"auto"`` for the one they were saved in.
    device
        Where the whole model goes; unset: the first CUDA device if there is one, else the CPU.
    device_map
        Passed to transformers instead of ``device``, to spread a model over devices.
    attn_implementation
        Attention kernel, for example ``"sdpa"`` or ``"flash_attention_2"``; unset: transformers chooses.
    revision
        Branch, tag or commit of a hub id.
    quantization
        ``"bnb-4bit"``, ``"bnb-8bit"`` (bitsandbytes, extra ``quant``), or a quantisation configuration of transformers.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode.
    processor : transformers.ProcessorMixin
        With left padding.

    Raises
    ------
    ModelError
        One line: the name is unknown, the checkpoint cannot be read or reached, takes no images, or needs code from
        its repository.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if device is not None and device_map is not None:
        raise ModelError(f"device ({device}) and device_map ({device_map}) were both given; pass one of them")
    path = _locate(str(name_or_path))
    hub = {} if revision is None else {"revision": revision}
    settings: dict[str, Any] = {"dtype": dtype, "device_map": device_map if device_map is not None else _placed(device)}
    if attn_implementation is not None:
        settings["attn_implementation"] = attn_implementation
    if quantization is not None:
        settings["quantization_config"] = _quantization(quantization)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(f"model type {config.model_type!r} takes no images and answers in no text")
        processor = load_processor(path, config, **hub)
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=False, **hub, **settings)
    except Exception as error:
        # Missing files, broken JSON, truncated weights, wrong shapes, no network: transformers, safetensors and the hub
        # client each raise classes of their own, and all of them mean that this checkpoint cannot be had.
        raise ModelError(_explain(str(name_or_path), path, error)) from error
    return model.eval(), processor


def identity(model: Any) -> dict[str, Any]:
    """
    What tells one checkpoint from another: the key of caches, and the provenance in result files.

    Parameters
    ----------
    model
        A loaded model.

    Returns
    -------
    dict
        ``name`` (hub id or folder name, empty for a model built in memory), ``revision`` (commit hash, None if not
        known), ``architecture``, ``parameters`` (their number) and ``fingerprint`` (over names, shapes, dtypes and a
        sample of the bytes of a few weights; weights on the meta device count by name, shape and dtype only).
    """
    named = str(getattr(model.config, "_name_or_path", "") or "")
    parameters = sorted(model.named_parameters())
    digest = hashlib.sha256()
    step = max(1, len(parameters) // 16)
    for name, parameter in parameters[::step]:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            digest.update(_sample(parameter))
    return {
        "name": Path(named).name if Path(named).is_dir() else named,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for _, parameter in parameters),
        "fingerprint": digest.hexdigest()[:32],
    }


def _sample(parameter: Any) -> bytes:
    """Bytes of at most 1024 values, spread evenly over a weight."""
    import torch

    flat = parameter.detach().flatten()
    # Whole bytes, so that every dtype (bfloat16, float8, packed integers) hashes without conversion.
    return flat[:: max(1, flat.numel() // 1024)][:1024].contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _locate(name: str) -> str:
    """Folder or hub id that a name stands for."""
    if name in BUNDLED:
        spec = find_spec("lmmhooks_eval")
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"{name} is part of lmmhooks_eval, which is not installed; pip install lmmhooks")
        folder = Path(next(iter(spec.submodule_search_locations))) / "tiny" / "weights" / name
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"the weights of {name} are missing from lmmhooks_eval; reinstall lmmhooks, or train them with "
                f"python -m lmmhooks_eval.tiny.train"
            )
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"folder {name} holds no model: it has no config.json; pass the folder save_pretrained wrote"
            )
        return str(folder)
    if _HUB_ID.fullmatch(name):
        return name
    raise ModelError(
        f"no model {name!r}: it is no folder, no hub id (owner/name), and not one of the bundled {', '.join(BUNDLED)}"
        f"{closest(name, BUNDLED)}"
    )


def _placed(device: Any) -> str | None:
    """``device_map`` for a whole model on one device; None leaves it on the CPU."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return None if str(device) == "cpu" else str(device)


def _quantization(wanted: Any) -> Any:
    if not isinstance(wanted, str):
        return wanted
    if wanted not in _BITS:
        raise ModelError(f"unknown quantization {wanted!r}; choose one of {', '.join(_BITS)}{closest(wanted, _BITS)}")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization {wanted} needs bitsandbytes; pip install 'lmmhooks[quant]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{_BITS[wanted]: True})


def _explain(name: str, path: str, error: Exception) -> str:
    """One line on why a checkpoint could not be loaded, and what to do."""
    text = str(error).strip()
    reason = text.splitlines()[0].rstrip(". ") if text else type(error).__name__
    if "trust_remote_code" in text or "custom code" in text:
        return f"cannot load {name}: it runs code from its repository; use a checkpoint of transformers' own classes"
    if Path(path).is_dir():
        return (
            f"cannot load {name}: {reason}; check that the folder is complete (config, weights, tokenizer, processor)"
        )
    return f"cannot load {name} from the hub: {reason}; check name, revision and connection, or pass a local folder"
