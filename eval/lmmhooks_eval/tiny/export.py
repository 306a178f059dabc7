"""Write a trained model as a folder that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lmmhooks_eval.tiny.models import build_model
from lmmhooks_eval.tiny.processors import save_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAX_NEW_TOKENS = 48
"""Longest caption plus slack."""


def export_model(name: str, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights (bfloat16 safetensors), configuration, generation configuration, tokenizer and processor.

    The weights go through a freshly built model, so that nothing of the training set-up (attention functions,
    precision) reaches the saved configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean = build_model(name, tokenizer)
    clean.load_state_dict(trained.state_dict())
    clean.tie_weights()
    clean.to(torch.bfloat16)
    clean.generation_config.do_sample = False
    clean.generation_config.max_new_tokens = MAX_NEW_TOKENS
    clean.save_pretrained(folder)
    save_processor(name, tokenizer, folder)
