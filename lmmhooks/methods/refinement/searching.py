"""Searches through a tree of views, led by what the model answers about them; see `ZoomEye`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmmhooks.methods.refinement.zooming import Node

__all__ = ["Confidence", "find_all", "find_one", "trust"]

Confidence = Callable[[Node, str], float]
"""What the model says of a node, in [-1, 1]: its ``"existence"``, ``"latent"`` or ``"answering"`` confidence."""


def trust(depth: int, deepest: int, bias: float) -> float:
    """
    How much a view's own content counts against what zooming in may find: ``bias`` at the root, 1 at the bottom.

    Parameters
    ----------
    depth
        Of the view.
    deepest
        Depth at which a search ends, 1 or more.
    bias
        In [0, 1].
    """
    return (1 - bias) / deepest**2 * depth**2 + bias


def find_one(
    root: Node,
    ask: Confidence,
    *,
    deepest: int,
    bias: float,
    threshold: float,
    floor: float,
    decrements: Sequence[float],
    pops: int,
    more_pops: int = 2,
    to_bottom: bool = False,
    skip_root: bool = False,
) -> tuple[list[Node], int]:
    """
    Best-first search for a view that shows one thing.

    Parameters
    ----------
    root
        Of the tree.
    ask
        Confidences; existence and latent are asked for once per node, answering when it is looked at.
    deepest
        Depth below which nothing is opened.
    bias
        See `trust`.
    threshold
        Answering confidence from which a view will do.
    floor
        The search ends when the threshold falls below it.
    decrements
        What is taken from the threshold each time the limit of looks is reached; the last one repeats.
    pops
        Looks until the threshold falls for the first time.
    more_pops
        Looks until it falls again.
    to_bottom
        A view that will do ends the search only once a leaf, or the deepest level, was looked at.
    skip_root
        The whole image never will do.

    Returns
    -------
    found : list of Node
        Views that will do, in the order in which they were found; empty where nothing does.
    looks : int
        Nodes looked at.
    """
    queue = [root]
    decrements = list(decrements)
    answering: dict[Node, float] = {}
    priority: dict[Node, float] = {}
    found: list[Node] = []
    at_bottom = False

    def wanted(node: Node) -> float:
        if node not in priority:
            weight = trust(node.depth, deepest, bias)
            priority[node] = ask(node, "existence") * weight + ask(node, "latent") * (1 - weight)
        return priority[node]

    while queue:
        node = queue.pop(0)
        skipped = skip_root and node is root
        answering[node] = -1.0 if skipped else ask(node, "answering")
        if not skipped and answering[node] >= threshold:
            found.append(node)
            if at_bottom or not to_bottom:
                break
        elif len(answering) >= pops:
            threshold -= decrements[0]
            decrements = decrements[1:] or decrements
            pops += more_pops
            passed = found + [seen for seen in answering if answering[seen] >= threshold and seen not in found]
            found = sorted(passed, key=answering.__getitem__, reverse=True)[:1] if len(passed) > 1 else passed
            if found or threshold < floor:
                break
        if not node.children or node.depth == deepest:
            at_bottom = True
            if to_bottom and found:
                break
        else:
            queue.extend(node.children)
        # Stable: among equals, what was opened earlier comes first.
        queue.sort(key=wanted, reverse=True)
    return found, len(answering)


def find_all(root: Node, ask: Confidence, *, threshold: float, depth: int = 2) -> list[Node]:
    """
    Every view that shows a thing better than what is inside it does.

    Parameters
    ----------
    root
        Of the tree.
    ask
        Existence confidence is asked for, once per node, children first.
    threshold
        Least confidence of a view that is kept.
    depth
        Of the deepest views.

    Returns
    -------
    list of Node
        Children before parents.
    """
    found: list[Node] = []

    def best(node: Node) -> float:
        inside = max((best(child) for child in node.children), default=-1.0) if node.depth < depth else -1.0
        own = ask(node, "existence")
        if own >= max(inside, threshold):
            found.append(node)
        return max(inside, own)

    best(root)
    return found
