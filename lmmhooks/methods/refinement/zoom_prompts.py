"""What ZoomEye asks: prompts of the released code, and examples of our own."""

from __future__ import annotations

import re

__all__ = [
    "ANSWERING",
    "EXAMPLES",
    "LOCAL",
    "MAIN_IMAGE",
    "NAMED",
    "NAMING",
    "WHOLE",
    "ZOOMED",
    "ZOOMED_IMAGE",
    "cues_in",
]

NAMED = "So I need the information about the following objects: "
NAMING = "Question: {}\nIf you want to answer the question, which objects' information do you need?"
_KNOW = "To answer the question, I need know the location of "
EXAMPLES = (
    (
        "What is the material of the bench?",
        f"{_KNOW}the bench so that I can determine its material. {NAMED}bench.",
    ),
    (
        "Is the dog above or below the bicycle?",
        f"{_KNOW}the dog and the bicycle so that I can determine the positional relationship between the two of them. "
        f"{NAMED}dog and bicycle.",
    ),
    (
        "How many birds are in the picture?",
        f"{_KNOW}every bird so that I can count them. {NAMED}all birds.",
    ),
    (
        "What does the man with the hat hold in his hand?",
        f"{_KNOW}the man with the hat so that I can determine what he holds. {NAMED}man with the hat.",
    ),
)

#: Prompts of the released code, its "the the" included.
ANSWERING = (
    "Question: {}\nCould you answer the question based on the the available visual information? Answer Yes or No."
)
LOCAL = {
    "existence": "Is there a {} in the image? Answer Yes or No.",
    "latent": "According to your common sense knowledge and the content of the image, is it possible to find a {} in "
    "the image? Answer Yes or No and tell the reason.",
    "answering": ANSWERING,
}
WHOLE = {
    "existence": "Is there a {} in the image? Answer Yes or No.",
    "latent": "According to your common sense knowledge and the content of image, is it possible to find a {} by "
    "further zooming in the image? Answer Yes or No and tell the reason.",
    "answering": ANSWERING,
}
ZOOMED = {
    "existence": "Is there a {} in the zoomed-in view? Answer Yes or No.",
    "latent": "According to your common sense knowledge and the content of the zoomed-in view, along with its location "
    "in the image, is it possible to find a {} by further zooming in the current view? Answer Yes or No and tell the "
    "reason.",
    "answering": ANSWERING,
}
MAIN_IMAGE = "This is the main image, and the section enclosed by the {} rectangle is the focus region.\n"
ZOOMED_IMAGE = "This is the zoomed-in view of the focus region.\n"


def cues_in(reply: str) -> list[str]:
    """The things that a reply names; empty where it does not end as it was shown to."""
    match = re.search(f"{NAMED}(.+)", reply)
    return re.split(" and |, ", match.group(1).removesuffix(".")) if match else []
