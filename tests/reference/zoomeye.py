"""ZoomEye the slow way: tables of nodes, confidences by full forwards, and one search written out step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]


def nodes_of(width: int, height: int, side: int) -> list[dict[str, Any]]:
    """All nodes of a tree of four parts, breadth first: box (left, top, width, height), depth, numbers of children."""
    nodes: list[dict[str, Any]] = [{"box": (0, 0, width, height), "depth": 0, "children": []}]
    at = 0
    while at < len(nodes):
        left, top, wide, high = nodes[at]["box"]
        if max(wide, high) >= side:
            if high >= 2 * wide:
                columns, rows = 1, 4
            elif 2 * high <= wide:
                columns, rows = 4, 1
            else:
                columns, rows = 2, 2
            across = [left + i * (wide // columns) for i in range(columns)] + [left + wide]
            down = [top + i * (high // rows) for i in range(rows)] + [top + high]
            for y in range(rows):
                for x in range(columns):
                    box = (across[x], down[y], across[x + 1] - across[x], down[y + 1] - down[y])
                    nodes[at]["children"].append(len(nodes))
                    nodes.append({"box": box, "depth": nodes[at]["depth"] + 1, "children": []})
        at += 1
    return nodes


def search(
    nodes: list[dict[str, Any]],
    says: Callable[[int, str], float],
    *,
    bias: float,
    tau: float,
    floor: float,
    falls: list[float],
    limit_depth: int = 5,
    to_bottom: bool = False,
    no_root: bool = False,
) -> tuple[list[int], list[int]]:
    """Numbers of the nodes that will do, and of all that were looked at, in order."""
    deepest = min(max(node["depth"] for node in nodes), limit_depth)
    limit, queue, looked, found, bottom = 3 * deepest, [0], [], [], False
    value: dict[int, float] = {}
    while queue:
        # The most promising; of equals, the one that came into the queue first.
        best = 0
        for place in range(1, len(queue)):
            if _wanted(nodes, says, queue[place], deepest, bias) > _wanted(nodes, says, queue[best], deepest, bias):
                best = place
        now = queue.pop(best) if looked else queue.pop(0)
        looked.append(now)
        value[now] = -1.0 if no_root and now == 0 else says(now, "answering")
        if not (no_root and now == 0) and value[now] >= tau:
            found.append(now)
            if not to_bottom or bottom:
                return found, looked
        elif len(looked) >= limit:
            tau = tau - falls[0]
            if len(falls) > 1:
                falls = falls[1:]
            limit += 2
            for node in looked:
                if value[node] >= tau and node not in found:
                    found.append(node)
            while len(found) > 1:
                # The worst goes, of equals the later one.
                worst = 0
                for place in range(len(found)):
                    if value[found[place]] <= value[found[worst]]:
                        worst = place
                found.pop(worst)
            if found or tau < floor:
                return found, looked
        if not nodes[now]["children"] or nodes[now]["depth"] == deepest:
            bottom = True
            if to_bottom and found:
                return found, looked
        else:
            queue += nodes[now]["children"]
    return found, looked


def _wanted(nodes: Any, says: Any, node: int, deepest: int, bias: float) -> float:
    share = nodes[node]["depth"] ** 2 / deepest**2
    weight = bias + (1 - bias) * share
    return weight * says(node, "existence") + (1 - weight) * says(node, "latent")


def patch(box: Box, width: int, height: int, side: int, scale: float) -> Box:
    """Left, top, right, bottom of what is shown of a node."""
    x, y = math.floor(box[0] + box[2] / 2), math.floor(box[1] + box[3] / 2)
    wide, high = math.floor(max(side, box[2]) * scale), math.floor(max(side, box[3]) * scale)
    left, top = x - wide // 2, y - high // 2
    left, top = left if left > 0 else 0, top if top > 0 else 0
    return left, top, left + wide if left + wide < width else width, top + high if top + high < height else height


def global_views(image: Image.Image, box: Box, side: int, color: Any) -> list[Image.Image]:
    """The image with one box drawn on it, and the box, with the image's proportions kept."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), color)
    x, y = (edge - image.width) // 2, (edge - image.height) // 2
    square.paste(image, (x, y))
    line = edge // 120
    drawn = (
        max(0, box[0] + x - line),
        max(0, box[1] + y - line),
        min(edge, box[2] + x + line),
        min(edge, box[3] + y + line),
    )
    ImageDraw.Draw(square).rectangle(drawn, outline="red", width=line)
    whole = square.crop((x, y, x + image.width, y + image.height))
    if image.width > image.height:
        small = whole.resize((side, int(image.height * side / image.width)))
    else:
        small = whole.resize((int(image.width * side / image.height), side))
    return [small, square.crop(drawn)]


def yes(model: Any, processor: Any, images: list[Image.Image], text: str, words: tuple[str, str]) -> float:
    """Confidence from a full forward over a prompt that is already written out, images and all."""
    inputs = processor(images=[list(images)], text=[text], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -1].float()
    ids = [processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    return 2 * (float(logits[ids].softmax(dim=0)[0]) - 0.5)
