"""The bundled model, once for all tests: what the playground starts on."""

from __future__ import annotations

import pytest

from lmmhooks.engines.runtime import find_runtime
from lmmhooks.loading import load
from lmmhooks.playground.examples import examples
from lmmhooks.playground.session import Session


@pytest.fixture(scope="session")
def loaded() -> Session:
    return Session(*load("tiny-llava", device="cpu"), "tiny-llava")


@pytest.fixture
def session(loaded):
    """The session; whatever a test does, the model must be as it was afterwards."""
    yield loaded
    assert find_runtime(loaded.model) is None


@pytest.fixture(scope="session")
def scene():
    """A picture, and a question that is answered with more than a word."""
    return examples()[-1]
