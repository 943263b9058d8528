"""Procedural captioned videos: one outlined shape that moves over a plain or textured ground.

A video is a function of its attributes (what the caption says), a `VideoConfig` (size and ranges)
and a seed (what the caption leaves open). Words, colours and textures are those of `pictures`.
Lengths are in units of the shorter side and speed is per frame, so the same seed at 64, 32 and
16 px shows the same scene, and fewer frames show the middle part of the same movement.
"""

import dataclasses
import functools
import itertools

import numpy as np
import numpy.typing as npt

from ddit_rt.lab.demo.images import (
    BACKGROUND_COLOURS,
    DISTANCES,
    OUTLINE_SHADE,
    RGB,
    Array,
    ImageConfig,
    area_average,
    draw_ground,
    rotate,
)

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "yellow", "green", "blue", "purple", "black")
DIRECTIONS = ("left", "right", "up", "down")
GROUNDS = ("plain", "stripes", "dots", "checkers")
GROUND_COLOURS = BACKGROUND_COLOURS

# Pictures have their rows from top to bottom.
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Size of the videos and the ranges that a seed draws from.

    Lengths (`jitter`, `radius`, `outline`, `speed`) are fractions of the shorter side, `speed` per
    frame; `rotation` is in radians. `ground` holds the ranges of the textures.
    """

    height: int = 64
    width: int = 64
    frames: int = 13
    jitter: float = 0.04
    radius: tuple[float, float] = (0.18, 0.23)
    speed: tuple[float, float] = (0.024, 0.030)
    rotation: float = 0.1
    outline: float = 0.03
    shade: float = 0.03

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        if min(self.height, self.width) < 8 or self.frames < 1:
            raise ValueError(
                f"height, width, frames are {self.height}, {self.width}, {self.frames}; expected "
                "sides of at least 8 px and at least one frame"
            )
        for name in ("radius", "speed"):
            low, high = getattr(self, name)
            if not 0 < low <= high < 1:
                raise ValueError(f"{name} is {(low, high)}, expected 0 < low <= high < 1")


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


def random_video_attributes(seed: int, index: int, *, held_out: bool = False) -> VideoAttributes:
    """Draw the combination of video `index`, from the training or the held-out combinations."""
    pool = _pool(held_out)
    return pool[int(np.random.default_rng([seed, index, 3]).integers(len(pool)))]


@functools.cache
def _pool(held_out: bool) -> tuple[VideoAttributes, ...]:
    return tuple(a for a in all_video_attributes() if is_held_out_video(a) == held_out)


def draw_video(
    attributes: VideoAttributes, config: VideoConfig, seed: int, index: int = 0
) -> Array:
    """Draw one video.

    Args:
        attributes: What to draw.
        config: Size and ranges.
        seed: Seed of the series.
        index: Number of the video within the series.

    Returns:
        ``[frames, height, width, 3]`` float32, RGB in [0, 1].
    """
    rng = np.random.default_rng([seed, index, 4])
    angle = rng.uniform(-config.rotation, config.rotation)
    middle = rng.uniform(-config.jitter, config.jitter, size=2)
    radius = np.float32(rng.uniform(*config.radius))
    speed = rng.uniform(*config.speed)
    shade = rng.uniform(-config.shade, config.shade, size=(2, 3)).astype(np.float32)
    image = ImageConfig(height=config.height, width=config.width)
    ground = draw_ground(attributes.ground, attributes.ground_colour, shade[0], rng, image)
    ground = area_average(ground, image.supersample)
    fill = np.asarray(RGB[attributes.colour], dtype=np.float32) + shade[1]
    times = np.arange(config.frames) - (config.frames - 1) / 2
    centres = middle + speed * times[:, None] * np.asarray(STEPS[attributes.direction])
    x, y = _pixel_centres(config, centres.astype(np.float32))
    distance = DISTANCES[attributes.shape](*rotate(x, y, angle), radius)
    inside, core = (_coverage(distance + shift, config) for shift in (0.0, config.outline))
    video = ground + (fill * np.float32(OUTLINE_SHADE) - ground) * inside
    return np.asarray(np.clip(video + (fill - video) * core, 0, 1), dtype=np.float32)


def draw_videos(
    config: VideoConfig, seed: int, start: int, count: int, *, held_out: bool = False
) -> tuple[npt.NDArray[np.uint8], list[VideoAttributes]]:
    """Draw videos ``start .. start + count - 1`` of a series.

    Returns:
        ``[count, 3, frames, height, width]`` uint8 RGB, and the attributes of each video.
    """
    drawn = [random_video_attributes(seed, start + i, held_out=held_out) for i in range(count)]
    videos = np.empty((count, 3, config.frames, config.height, config.width), dtype=np.uint8)
    for i, attributes in enumerate(drawn):
        video = draw_video(attributes, config, seed, start + i)
        videos[i] = np.rint(video.transpose(3, 0, 1, 2) * 255).astype(np.uint8)
    return videos, drawn


def _pixel_centres(config: VideoConfig, centres: Array) -> tuple[Array, Array]:
    """Pixel centres relative to the shape's, each ``[frames, height, width]``."""
    unit = np.float32(min(config.height, config.width))
    y = (np.arange(config.height, dtype=np.float32) + 0.5 - config.height / 2) / unit
    x = (np.arange(config.width, dtype=np.float32) + 0.5 - config.width / 2) / unit
    shape = (config.frames, config.height, config.width)
    return (
        np.broadcast_to(x[None, None, :] - centres[:, 0, None, None], shape),
        np.broadcast_to(y[None, :, None] - centres[:, 1, None, None], shape),
    )


def _coverage(distance: Array, config: VideoConfig) -> Array:
    """Share of each pixel inside the outline, ``[frames, height, width, 1]``."""
    pixels = distance * np.float32(min(config.height, config.width))
    return np.asarray(np.clip(0.5 - pixels, 0, 1), dtype=np.float32)[..., None]
