"""Captions of the demo's images: one outlined shape before a plain or textured background.

An image is drawn from its attributes, which the caption says; `scripts/demo_training` draws those
that the embedded model was trained on.
"""

import dataclasses
import itertools

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")
BACKGROUNDS = ("plain", "fade", "stripes", "dots", "checkers", "rings")
BACKGROUND_COLOURS = ("red", "yellow", "green", "blue")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a caption says about an image; every field is a word of the tuples above."""

    shape: str
    colour: str
    background: str
    background_colour: str

    def __post_init__(self) -> None:
        """Reject words that no image is drawn for."""
        for name, known in _VOCABULARY.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")

    @property
    def caption(self) -> str:
        """The caption, e.g. ``a red circle on blue stripes`` or ``a red circle on plain blue``."""
        ground = f"{self.background_colour} {self.background}"
        if self.background == "plain":
            ground = f"plain {self.background_colour}"
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape} on {ground}"

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """Class indices in the order shape, colour, background, background colour."""
        shape, colour, background, tint = (
            known.index(getattr(self, name)) for name, known in _VOCABULARY.items()
        )
        return shape, colour, background, tint


_VOCABULARY: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "background": BACKGROUNDS,
    "background_colour": BACKGROUND_COLOURS,
}
ATTRIBUTE_SIZES: dict[str, int] = {name: len(known) for name, known in _VOCABULARY.items()}


def all_attributes() -> list[Attributes]:
    """All 768 combinations, shape varying slowest and background colour fastest."""
    return [
        Attributes(shape=s, colour=c, background=b, background_colour=t)
        for s, c, b, t in itertools.product(SHAPES, COLOURS, BACKGROUNDS, BACKGROUND_COLOURS)
    ]


def is_held_out(attributes: Attributes) -> bool:
    """Whether a combination (one in sixteen) is kept out of training; its words all occur there."""
    shape, colour, background, tint = attributes.labels
    return (shape + 3 * colour + 5 * background + 7 * tint) % 16 == 0


def parse_caption(caption: str) -> Attributes:
    """Inverse of `Attributes.caption`.

    Raises:
        ValueError: If the caption does not follow the pattern of `Attributes.caption`.
    """
    words = caption.split()
    if len(words) != 6 or words[3] != "on":
        raise ValueError(
            f"caption is {caption!r}, expected e.g. 'a red circle on blue stripes' "
            "or 'a red circle on plain blue'"
        )
    ground, tint = (words[4], words[5]) if words[4] == "plain" else (words[5], words[4])
    return Attributes(colour=words[1], shape=words[2], background=ground, background_colour=tint)
