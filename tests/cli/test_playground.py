"""`lmmhooks playground` says before it loads a model what stands in its way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from lmmhooks.cli import playground
from lmmhooks.playground.server import listen
from tests.cli.invoke import invoke


def test_missing_extra_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(playground, "find_spec", lambda name: None)
    done = invoke("playground")
    assert done.status == 2
    assert done.err == "error: the playground needs gradio, which is not installed: pip install 'lmmhooks[ui]'\n"


def test_port_in_use_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(playground, "find_spec", lambda name: object())
    with listen(0) as taken:
        port = taken.getsockname()[1]
        done = invoke("playground", "--port", str(port), "--model", "no/such/model")
    assert done.status == 2
    assert done.err == f"error: port {port} is already in use; give another with --port, or 0 for any\n"


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install '.[ui]'")
def test_unknown_model_is_one_line() -> None:
    done = invoke("playground", "--port", "0", "--model", "tiny-lava")
    assert done.status == 2
    assert "did you mean 'tiny-llava'" in done.err


def test_help_needs_neither_torch_nor_gradio() -> None:
    code = (
        "import sys\nfrom lmmhooks.cli.app import main\n"
        "try:\n    main(['playground', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(','.join({'torch', 'transformers', 'gradio', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "--port" in done.stdout
