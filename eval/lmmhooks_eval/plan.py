"""What a run will ask, in which batches: the same for every variant, decided before the first answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.identity import image_digest
from lmmhooks_eval.task import Doc, Task

__all__ = ["Item", "batches", "prepare", "select"]


@dataclass(frozen=True)
class Item:
    """
    One document, ready to be asked.

    Parameters
    ----------
    doc, doc_id, cluster
        The document, its id and what it shares with others.
    question
        What is asked, as plain text.
    prompt
        The rendered prompt, template included.
    image
        Digest of the images' pixels.
    sizes
        (width, height) of every image in pixels.
    error
        Why the document cannot be asked, in one line; None if it can.
    """

    doc: Doc
    doc_id: str
    cluster: str
    question: str = ""
    prompt: str = ""
    image: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    error: str | None = None


def select(task: Task, docs: Sequence[Doc], limit: int | None, seed: int) -> list[Doc]:
    """
    About `limit` documents that keep the proportions of the task's strata, in the task's order.

    Whole clusters are taken, so the number is rounded to clusters (at least one): clusters with the same mix of
    strata form a group, every group gives its share of the limit, drawn with the seed. The first n documents of a
    file would not do: many benchmarks are sorted by class.

    Parameters
    ----------
    task
        Says what a cluster and a stratum are.
    docs
        All documents.
    limit
        Number wanted; None for all.
    seed
        Of the draw.
    """
    if limit is None or limit >= len(docs):
        return list(docs)
    members: dict[str, list[Doc]] = {}
    for doc in docs:
        members.setdefault(task.cluster(doc), []).append(doc)
    groups: dict[tuple[str, ...], list[str]] = {}
    for cluster, content in members.items():
        groups.setdefault(tuple(sorted({task.stratum(doc) for doc in content})), []).append(cluster)
    quotas = _shares({mix: sum(len(members[cluster]) for cluster in names) for mix, names in groups.items()}, limit)
    chosen: set[str] = set()
    for mix, names in sorted(groups.items()):
        order = sorted(names)
        random.Random(f"{seed}/{mix}").shuffle(order)
        taken = 0
        for cluster in order:
            # Take a cluster if that brings the group nearer to its quota than leaving it.
            if taken + len(members[cluster]) / 2 > quotas[mix]:
                break
            chosen.add(cluster)
            taken += len(members[cluster])
    if not chosen:
        order = sorted(members)
        chosen = {random.Random(f"{seed}").choice(order)}
    return [doc for doc in docs if task.cluster(doc) in chosen]


def _shares(sizes: Mapping[tuple[str, ...], int], limit: int) -> dict[tuple[str, ...], int]:
    """Split `limit` in proportion to the sizes, by largest remainder."""
    total = sum(sizes.values())
    exact = {mix: limit * size / total for mix, size in sizes.items()}
    result = {mix: int(share) for mix, share in exact.items()}
    by_remainder = sorted(exact, key=lambda mix: (result[mix] - exact[mix], mix))
    for mix in by_remainder[: limit - sum(result.values())]:
        result[mix] += 1
    return result


def prepare(task: Task, doc: Doc, processor: Any, prompt: str | None = None, system: str | None = None) -> Item:
    """
    Render the prompt of a document and look at its images.

    A document that cannot be asked (image missing or not decodable, empty prompt) comes back with its reason in
    `error`: the run goes on with the others and fails at the end.
    """
    doc_id, cluster = str(doc["id"]), task.cluster(doc)
    try:
        images = task.images(doc)
        for image in images:
            image.load()
        question = task.question(doc, prompt)
        messages = task.messages(doc, prompt, system)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (OSError, SyntaxError, TaskError, KeyError) as error:
        # Pillow raises OSError for missing, unknown and truncated files, and SyntaxError for broken PNG chunks.
        reason = f"the prompt needs the field {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        return Item(doc, doc_id, cluster, error=f"document {doc_id!r} of {task.name} cannot be asked: {reason}")
    sizes = tuple((image.width, image.height) for image in images)
    return Item(doc, doc_id, cluster, question, text, image_digest(images), sizes)


def batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """
    Group items that can be asked together: equal image sizes, similar prompt lengths.

    Image area stands for the number of visual tokens, of which it is a non-decreasing function in every family. Large
    ones come first, so that memory runs out at the start of a run if it does.
    """
    by_sizes: dict[tuple[tuple[int, int], ...], list[Item]] = {}
    for item in items:
        by_sizes.setdefault(item.sizes, []).append(item)
    area = {sizes: sum(width * height for width, height in sizes) for sizes in by_sizes}
    result = []
    for sizes in sorted(by_sizes, key=lambda key: (-area[key], key)):
        group = sorted(by_sizes[sizes], key=lambda item: (-len(item.prompt), item.doc_id))
        result += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return result
