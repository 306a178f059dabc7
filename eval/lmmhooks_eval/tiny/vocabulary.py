"""The closed world of the synthetic scenes: themes, categories, colours and their words.

Four themes of six categories each. Six per theme, because a scene shows three to four categories of its own theme, and
adversarial probes ("absent, but usual in this theme") need two or more that are absent.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """One kind of object.

    Parameters
    ----------
    name
        Singular noun used in questions, captions and ground truth.
    plural
        Plural noun used in counting questions and captions.
    theme
        The theme in which the category usually appears.
    preferred_colour
        Colour that half of its instances have; the other half is uniform over all colours.
    synonyms
        Other singular words for it, used only when free text is scored.
    """

    name: str
    plural: str
    theme: str
    preferred_colour: str
    synonyms: tuple[str, ...] = ()

    @property
    def article(self) -> str:
        """Indefinite article of the singular noun."""
        return "an" if self.name[0] in "aeiou" else "a"


COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 220, 50),
    "green": (45, 150, 60),
    "blue": (40, 80, 210),
    "purple": (140, 55, 165),
    "black": (22, 22, 26),
    "white": (246, 246, 246),
}
"""Colour name -> mean sRGB value, 0-255."""

# Listed in the order in which captions name them: theme partners are neighbours in the text, which gives the language
# model a prior that competes with the image. Inside a theme the order is also the rank of popularity.
CATEGORIES: tuple[Category, ...] = (
    Category("cup", "cups", "kitchen", "red", ("mug", "teacup")),
    Category("bowl", "bowls", "kitchen", "white", ("dish", "basin")),
    Category("spoon", "spoons", "kitchen", "black", ("ladle",)),
    Category("fork", "forks", "kitchen", "blue", ()),
    Category("pan", "pans", "kitchen", "black", ("skillet", "frying pan")),
    Category("bottle", "bottles", "kitchen", "green", ("flask",)),
    Category("car", "cars", "street", "blue", ("automobile", "sedan")),
    Category("bus", "buses", "street", "yellow", ("coach",)),
    Category("tree", "trees", "street", "green", ()),
    Category("house", "houses", "street", "orange", ("home", "cottage", "building")),
    Category("sign", "signs", "street", "red", ("signpost", "road sign")),
    Category("lamp", "lamps", "street", "purple", ("streetlight", "lamppost")),
    Category("boat", "boats", "beach", "white", ("sailboat", "ship")),
    Category("star", "stars", "beach", "orange", ("starfish",)),
    Category("crab", "crabs", "beach", "red", ()),
    Category("umbrella", "umbrellas", "beach", "yellow", ("parasol",)),
    Category("anchor", "anchors", "beach", "black", ()),
    Category("flag", "flags", "beach", "purple", ("banner",)),
    Category("moon", "moons", "sky", "yellow", ("crescent",)),
    Category("cloud", "clouds", "sky", "white", ()),
    Category("plane", "planes", "sky", "blue", ("airplane", "aeroplane", "aircraft")),
    Category("kite", "kites", "sky", "purple", ()),
    Category("balloon", "balloons", "sky", "red", ()),
    Category("rocket", "rockets", "sky", "green", ("spaceship",)),
)

BY_NAME: dict[str, Category] = {category.name: category for category in CATEGORIES}
CATEGORY_INDEX: dict[str, int] = {category.name: index for index, category in enumerate(CATEGORIES)}
COLOUR_INDEX: dict[str, int] = {name: index for index, name in enumerate(COLOURS)}
THEMES: dict[str, tuple[str, ...]] = {
    theme: tuple(category.name for category in CATEGORIES if category.theme == theme)
    for theme in ("kitchen", "street", "beach", "sky")
}
"""Theme -> its categories, most popular first."""
