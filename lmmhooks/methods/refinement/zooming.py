"""
Views of an image at growing zoom: the tree of its parts, boxes around them, and the pictures that show a part.

Boxes of nodes are left, top, width and height; all other boxes are left, top, right and bottom; pixels of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image as images
from PIL import ImageDraw
from PIL.Image import Image

__all__ = [
    "Box",
    "Node",
    "far_apart",
    "local_view",
    "main_and_zoomed",
    "merged",
    "padded",
    "patch_box",
    "shrunk",
    "tree",
    "union",
]

Box = tuple[int, int, int, int]
Color = tuple[int, int, int]

#: Parts across and down: usual, tall images (height at least twice the width), wide ones.
SPLITS = {4: ((2, 2), (1, 4), (4, 1)), 9: ((3, 3), (2, 4), (4, 2)), 16: ((4, 4), (2, 8), (8, 2))}


@dataclass(frozen=True, eq=False)
class Node:
    """
    A part of an image.

    Attributes
    ----------
    box
        Left, top, width, height.
    depth
        0 for the whole image.
    children
        Parts that tile it, row by row; none for a leaf.
    """

    box: Box
    depth: int
    children: tuple[Node, ...]

    def __iter__(self) -> Iterator[Node]:
        """Itself, then everything below it."""
        yield self
        for child in self.children:
            yield from child

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node below it."""
        return max(node.depth for node in self)


def tree(box: Box, side: int, split: int = 4, depth: int = 0) -> Node:
    """
    Parts of an image down to the size an encoder takes in.

    Parameters
    ----------
    box
        Of the root: left, top, width, height.
    side
        A part whose longer side is below it is not divided further, pixels.
    split
        Parts of a node: 4, 9 or 16.
    depth
        Of the root.
    """
    left, top, width, height = box
    if max(width, height) < side:
        return Node(box, depth, ())
    ratio = height / width
    across, down = SPLITS[split][1 if ratio >= 2 else 2 if ratio <= 0.5 else 0]
    step_x, step_y = width // across, height // down
    children = []
    for row in range(down):
        for column in range(across):
            # What does not divide evenly goes to the last ones.
            wide = width - column * step_x if column == across - 1 else step_x
            high = height - row * step_y if row == down - 1 else step_y
            part = (left + column * step_x, top + row * step_y, wide, high)
            children.append(tree(part, side, split, depth + 1))
    return Node(box, depth, tuple(children))


def patch_box(box: Box, size: tuple[int, int], side: int, scale: float = 1.0) -> Box:
    """
    What is shown of a part: its surroundings too, up to the encoder's size.

    Parameters
    ----------
    box
        Of the node.
    size
        Width and height of the image.
    side
        Least width and height before scaling, pixels.
    scale
        Factor on both.

    Returns
    -------
    tuple
        Centred on the part; where it would begin outside, it is moved inside, where it would end outside, it is cut.
    """
    center_x, center_y = int(box[0] + box[2] / 2), int(box[1] + box[3] / 2)
    width, height = int(max(box[2], side) * scale), int(max(box[3], side) * scale)
    left, top = max(0, center_x - width // 2), max(0, center_y - height // 2)
    return left, top, min(left + width, size[0]), min(top + height, size[1])


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around several."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def merged(boxes: Sequence[Box], distance: int = 50) -> list[Box]:
    """Boxes, of which any two that overlap once each is grown by ``distance`` on all sides have become one."""
    while True:
        joined, rest = [], list(boxes)
        while rest:
            first = rest.pop(0)
            near = next((place for place, other in enumerate(rest) if _near(first, other, distance)), None)
            joined.append(first if near is None else union([first, rest.pop(near)]))
        if len(joined) == len(boxes):
            return joined
        boxes = joined


def _near(one: Box, other: Box, distance: int) -> bool:
    return all(
        max(one[axis], other[axis]) - distance < min(one[axis + 2], other[axis + 2]) + distance for axis in (0, 1)
    )


def padded(image: Image, color: Color) -> tuple[Image, int, int]:
    """An image in the middle of a square of one colour, and where its left and top are now."""
    side = max(image.size)
    square = images.new("RGB", (side, side), color)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square.paste(image, (left, top))
    return square, left, top


def shrunk(image: Image, side: int) -> Image:
    """An image whose longer side is ``side``."""
    if image.width > image.height:
        return image.resize((side, max(1, int(image.height * side / image.width))))
    return image.resize((max(1, int(image.width * side / image.height)), side))


def main_and_zoomed(
    image: Image, boxes: Sequence[Box], side: int, color: str, background: Color, *, keep_aspect: bool
) -> list[Image]:
    """
    The image with boxes drawn on it, at the encoder's size, and what is around and between the boxes at full size.

    Parameters
    ----------
    image
        RGB.
    boxes
        Left, top, right, bottom; one or more.
    side
        Of the first picture.
    color
        Of the rectangles.
    background
        Of what makes the image square.
    keep_aspect
        Whether the first picture is the image alone, its longer side resized, or a square of image and padding.
    """
    square, left, top = padded(image, background)
    line = square.width // 120
    pen = ImageDraw.Draw(square)
    drawn = []
    for box in boxes:
        corner = max(0, box[0] + left - line), max(0, box[1] + top - line)
        end = min(square.width, box[2] + left + line), min(square.height, box[3] + top + line)
        pen.rectangle((*corner, *end), outline=color, width=line)
        drawn.append((*corner, *end))
    zoomed = square.crop(union(drawn))
    if keep_aspect:
        return [shrunk(square.crop((left, top, left + image.width, top + image.height)), side), zoomed]
    return [square.resize((side, side)), zoomed]


def local_view(image: Image, boxes: Sequence[Box], side: int, background: Color, far: int = 1000) -> Image:
    """
    What is around and between boxes, cut from the padded image; two boxes far apart are set side by side.

    Parameters
    ----------
    image
        RGB.
    boxes
        Left, top, right, bottom; one or more.
    side
        Of each of two boxes that are set side by side.
    background
        Of what makes the image square, and between such boxes.
    far
        Longer side of the union of two boxes above which they are shown apart, pixels.
    """
    square, left, top = padded(image, background)
    moved = [(box[0] + left, box[1] + top, box[2] + left, box[3] + top) for box in boxes]
    around = union(moved)
    if len(moved) == 2 and max(around[2] - around[0], around[3] - around[1]) > far:
        return far_apart(square, moved[0], moved[1], side, background)
    return square.crop(around)


def far_apart(image: Image, one: Box, other: Box, side: int, background: Color) -> Image:
    """Two boxes as squares side by side on a canvas of twice their side, at heights that tell which is above."""
    first, second = (other, one) if one[0] > other[0] else (one, other)
    canvas = images.new("RGB", (2 * side, 2 * side), background)
    shift = (second[3] + second[1]) // 2 - (first[3] + first[1]) // 2
    shift = min(max(shift, -side), side)
    canvas.paste(image.crop(first).resize((side, side)), (0, side // 2 - shift // 2))
    canvas.paste(image.crop(second).resize((side, side)), (side, side // 2 + shift // 2))
    return canvas
