"""The key of an answer changes with everything that can change the answer, and with nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

import lmmhooks
from lmmhooks_eval.identity import ModelIdentity, answer_key, digest, image_digest, item_seed

IDENTITY = ModelIdentity("m", "rev", "float32", "sdpa", "none", "proc", "tmpl")
GIVEN: dict[str, Any] = {
    "task": "t",
    "doc_id": "1",
    "prompt": "?",
    "image": "i",
    "generation": {"max_new_tokens": 4},
    "seed": None,
}


def _key(identity: ModelIdentity = IDENTITY, methods: tuple[Any, ...] = (), **changes: Any) -> str:
    return answer_key(identity, methods, **{**GIVEN, **changes})


@pytest.mark.parametrize("field", list(GIVEN))
def test_every_part_of_the_question_counts(field: str) -> None:
    assert _key(**{field: {"max_new_tokens": 5} if field == "generation" else "other"}) != _key()


@pytest.mark.parametrize("field", ModelIdentity.__dataclass_fields__)
def test_every_part_of_the_model_counts(field: str) -> None:
    assert _key(replace(IDENTITY, **{field: "other"})) != _key()


def test_methods_count_with_all_their_settings_and_their_order() -> None:
    var, other = lmmhooks.method("var"), lmmhooks.method("var", p=0.5)
    identity = lmmhooks.method("attention-identity")
    keys = {_key(methods=m) for m in [(), (var,), (other,), (identity,), (var, identity), (identity, var)]}
    assert len(keys) == 6
    # A default written out is the same method.
    assert _key(methods=(var,)) == _key(methods=(lmmhooks.method("var", p=var.p),))


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_image_digest_is_about_pixels_and_their_order() -> None:
    red, blue = Image.new("RGB", (2, 3), "red"), Image.new("RGB", (2, 3), "blue")
    assert image_digest([red, blue]) != image_digest([blue, red])
    assert image_digest([red]) != image_digest([red.resize((3, 2))])
    assert image_digest([red]) == image_digest([red.copy()])


def test_item_seeds_are_stable_and_apart() -> None:
    assert item_seed(0, "a") == item_seed(0, "a")
    seeds = {item_seed(seed, doc) for seed in range(3) for doc in "abc"}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)
