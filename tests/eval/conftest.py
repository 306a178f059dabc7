"""An untrained model in the shape of the bundled one: a real checkpoint folder, made in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `lmmhooks.load` takes; random weights, so its answers are babble, but deterministic babble."""
    from lmmhooks_eval.tiny.export import export_model
    from lmmhooks_eval.tiny.models import build_model
    from lmmhooks_eval.tiny.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("untrained") / "tiny-llava"
    tokenizer = build_tokenizer("tiny-llava")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model("tiny-llava", tokenizer)
    export_model("tiny-llava", model, tokenizer, folder)
    return folder
