"""`lmmhooks doctor` tells what is there and what would be used, and fails when a requirement is not met."""

from __future__ import annotations

import json

import torch
import transformers

from lmmhooks.cli import doctor
from tests.cli.invoke import invoke


def test_json_matches_the_environment() -> None:
    done = invoke("doctor", "--json")
    found = json.loads(done.out)
    assert done.status == 0, found["problems"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["devices"][-1]["device"] == "cpu"
    assert found["would_use"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["attention"]["sdpa"] == "available"


def test_text_names_versions_and_choice() -> None:
    text = invoke("doctor").out
    assert transformers.__version__ in text
    assert "would use" in text


def test_unmet_requirements_are_problems(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=999", "not-there>=1", 'absent; extra == "dev"'])
    assert doctor._problems() == [
        f"torch {torch.__version__} is installed, torch>=999 is needed: pip install 'torch>=999'",
        "not-there is not installed: pip install 'not-there>=1'",
    ]
