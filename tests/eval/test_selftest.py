"""The self-test passes when nothing changes and names what changed when something does."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

import lmmhooks
from lmmhooks_eval.errors import RunError
from lmmhooks_eval.selftest import self_test

IDS = ("a", "b")
METHODS = (lmmhooks.method("var", sink_dims="any"),)


class Model:
    """Answers with fixed tokens, and with others while a fake patch of the wrong kind is on."""

    def __init__(self, leak: str = "") -> None:
        self.leak, self.state = leak, ""

    def ask(self) -> list[tuple[int, ...]]:
        return [(1, 2, 3), (4, 9) if self.state and self.state == self.leak else (4, 5)]

    @contextmanager
    def wrap(self, methods: tuple[Any, ...]) -> Any:
        model, self.state = self, "identity" if "identity" in methods[0].id else "active"

        class Patch:
            def disabled(self) -> AbstractContextManager[None]:
                @contextmanager
                def off() -> Any:
                    model.state = "disabled"
                    yield

                return off()

        yield Patch()
        self.state = "removed"


def test_doing_nothing_passes_and_is_recorded() -> None:
    model = Model()
    compared = self_test(model.ask, model.wrap, [METHODS], IDS)
    assert {"attention-identity", "reduction-identity", "decoding-identity"} <= set(compared)
    assert any(label.startswith("var(") and label.endswith(", disabled") for label in compared)
    assert compared[-1] == "all patches removed"


@pytest.mark.parametrize(
    ("leak", "label"), [("identity", "-identity"), ("disabled", "disabled"), ("removed", "removed")]
)
def test_a_difference_is_named_with_document_and_token(leak: str, label: str) -> None:
    model = Model(leak)
    with pytest.raises(RunError, match="self-test failed") as caught:
        self_test(model.ask, model.wrap, [METHODS], IDS)
    assert label in str(caught.value)
    assert "document 'b'" in str(caught.value)
    assert "token 1" in str(caught.value)
