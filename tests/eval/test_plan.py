"""Selection of documents, preparation of prompts, batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lmmhooks_eval.metrics import yesno
from lmmhooks_eval.plan import Item, batches, prepare, select
from lmmhooks_eval.task import Source, Task


def make_task(folder: Path | None = None, **changes: Any) -> Task:
    """A yes/no task over documents handed to `select` or `prepare` directly."""
    settings: dict[str, Any] = {
        "name": "made-up",
        "title": "Made up",
        "licence": "none",
        "source": lambda: Source("local", "memory"),
        "load": list,
        "images": lambda doc: [Image.open((folder or Path()) / doc["image"])] if doc.get("image") else [],
        "prompts": {"bare": "{question}"},
        "parsers": yesno.PARSERS,
        "score": lambda verdict, doc: yesno.score(verdict, doc["label"], "random"),
        "aggregate": lambda totals: yesno.aggregate(totals, ("random",)),
        "metrics": yesno.metrics(("random",)),
        "item_score": "correct",
        "cluster": lambda doc: doc["group"],
        "stratum": lambda doc: doc["label"],
    }
    return Task(**{**settings, **changes})


DOCS = [
    {"id": index, "group": f"g{index // 6}", "label": "yes" if index % 3 else "no", "question": "?"}
    for index in range(120)
]


def test_no_limit_takes_all_in_order() -> None:
    assert select(make_task(), DOCS, None, 0) == DOCS
    assert select(make_task(), DOCS, 120, 0) == DOCS


@pytest.mark.parametrize("limit", [6, 30, 60])
def test_limited_samples_hold_whole_clusters_in_order(limit: int) -> None:
    chosen = select(make_task(), DOCS, limit, 0)
    assert len(chosen) == limit
    assert set(Counter(doc["group"] for doc in chosen).values()) == {6}
    assert [doc["id"] for doc in chosen] == sorted(doc["id"] for doc in chosen)


def test_strata_keep_their_proportions_when_clusters_are_pure() -> None:
    docs = [{"id": i, "group": str(i), "label": "yes" if i < 30 else "no"} for i in range(120)]
    chosen = select(make_task(), docs, 40, 0)
    assert Counter(doc["label"] for doc in chosen) == {"yes": 10, "no": 30}


def test_the_sample_depends_on_the_seed_and_nothing_else() -> None:
    task = make_task()
    first = select(task, DOCS, 30, 1)
    assert select(task, list(reversed(DOCS)), 30, 1) == list(reversed(first))
    assert select(task, DOCS, 30, 2) != first
    assert [doc["id"] for doc in first] != list(range(30))


def test_a_limit_below_one_cluster_still_takes_one() -> None:
    assert len(select(make_task(), DOCS, 1, 0)) == 6


def test_batches_hold_one_image_size_and_large_images_come_first() -> None:
    items = [
        Item({}, f"{side}-{index}", "c", prompt="x" * index, sizes=((side, side),))
        for index in range(5)
        for side in (112, 336, 224)
    ]
    planned = batches(items, 3)
    assert [len(batch) for batch in planned] == [3, 2, 3, 2, 3, 2]
    assert [{item.sizes for item in batch} for batch in planned] == [
        {((side, side),)} for side in (336, 336, 224, 224, 112, 112)
    ]
    assert batches(list(reversed(items)), 3) == planned
    assert [len(item.prompt) for item in planned[0] + planned[1]] == [4, 3, 2, 1, 0]


class Processor:
    """Just the one method `prepare` calls."""

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return " ".join(part.get("text", "<image>") for message in messages for part in message["content"])


def _doc(**changes: Any) -> dict[str, Any]:
    return {"id": "d", "group": "g", "label": "yes", "image": "a.png", "question": "Is it?", **changes}


def test_prepare_renders_and_digests(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 4), "red").save(tmp_path / "b.bmp")
    Image.new("RGB", (8, 4), "blue").save(tmp_path / "c.png")
    task = make_task(tmp_path)
    first, same, other = (prepare(task, _doc(image=name), Processor()) for name in ("a.png", "b.bmp", "c.png"))
    assert first.prompt == "<image> Is it?"
    assert first.sizes == ((8, 4),)
    assert first.image == same.image != other.image
    assert prepare(task, _doc(), Processor(), system="Be brief.").prompt == "Be brief. <image> Is it?"


def test_what_cannot_be_asked_says_why_in_one_line(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("not an image")
    for doc, reason in [
        (_doc(image="missing.png"), "No such file"),
        (_doc(image="torn.png"), "truncated"),
        (_doc(image="text.png"), "cannot identify image file"),
        (_doc(image="whole.png", question="  "), "the prompt of document 'd' is empty"),
        ({"id": "d", "group": "g", "label": "yes", "image": "whole.png"}, "needs the field 'question'"),
    ]:
        error = prepare(task, doc, Processor()).error
        assert error is not None
        assert reason in error
        assert "\n" not in error
