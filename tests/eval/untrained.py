"""An untrained model in the shape of the bundled one: a real checkpoint folder, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from lmmhooks_eval.tiny.export import export_model
from lmmhooks_eval.tiny.models import build_model
from lmmhooks_eval.tiny.tokenizer import build_tokenizer


def export_untrained(folder: Path) -> Path:
    """Write a folder that `lmmhooks.load` takes; its random weights answer in babble, but in deterministic babble."""
    tokenizer = build_tokenizer("tiny-llava")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model("tiny-llava", tokenizer)
    export_model("tiny-llava", model, tokenizer, folder)
    return folder
