"""Captions of the demo's videos: one outlined shape that moves over a plain or textured ground.

`scripts/demo_training` draws the videos that the embedded model was trained on.
"""

import dataclasses
import itertools

from ddit_rt.lab.demo.images import BACKGROUND_COLOURS

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "yellow", "green", "blue", "purple", "black")
DIRECTIONS = ("left", "right", "up", "down")
GROUNDS = ("plain", "stripes", "dots", "checkers")
GROUND_COLOURS = BACKGROUND_COLOURS

# Images have their rows from top to bottom.
STEPS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VideoAttributes:
    """What a caption says about a video; every field is a word of the tuples above."""

    shape: str
    colour: str
    direction: str
    ground: str
    ground_colour: str

    def __post_init__(self) -> None:
        """Reject words that no video is drawn for."""
        for name, known in _VOCABULARY.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")

    @property
    def caption(self) -> str:
        """The caption, e.g. ``a red circle moving left on blue stripes`` (or ``plain blue``)."""
        ground = f"{self.ground_colour} {self.ground}"
        if self.ground == "plain":
            ground = f"plain {self.ground_colour}"
        return f"a {self.colour} {self.shape} moving {self.direction} on {ground}"

    @property
    def labels(self) -> tuple[int, ...]:
        """Class indices in the order shape, colour, direction, ground, ground colour."""
        return tuple(known.index(getattr(self, name)) for name, known in _VOCABULARY.items())


_VOCABULARY: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "direction": DIRECTIONS,
    "ground": GROUNDS,
    "ground_colour": GROUND_COLOURS,
}
VIDEO_ATTRIBUTE_SIZES: dict[str, int] = {name: len(known) for name, known in _VOCABULARY.items()}


def all_video_attributes() -> list[VideoAttributes]:
    """All 1152 combinations, shape varying slowest and ground colour fastest."""
    combinations = itertools.product(*_VOCABULARY.values())
    return [VideoAttributes(**dict(zip(_VOCABULARY, words, strict=True))) for words in combinations]


def is_held_out_video(attributes: VideoAttributes) -> bool:
    """Whether a combination (one in sixteen) is kept out of training; its words all occur there."""
    weights = (1, 3, 5, 7, 9)
    total = sum(w * label for w, label in zip(weights, attributes.labels, strict=True))
    return total % 16 == 0


def parse_video_caption(caption: str) -> VideoAttributes:
    """Inverse of `VideoAttributes.caption`.

    Raises:
        ValueError: If the caption does not follow the pattern of `VideoAttributes.caption`.
    """
    words = caption.split()
    if len(words) != 8 or words[3] != "moving" or words[5] != "on":
        raise ValueError(
            f"caption is {caption!r}, expected e.g. 'a red circle moving left on blue stripes' "
            "or 'a red circle moving left on plain blue'"
        )
    ground, tint = words[6:] if words[6] == "plain" else reversed(words[6:])
    return VideoAttributes(
        colour=words[1], shape=words[2], direction=words[4], ground=ground, ground_colour=tint
    )
