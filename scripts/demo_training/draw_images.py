"""Procedural images of the demo's captions.

An image is a function of its attributes, an `ImageConfig` (size and ranges) and a seed (what the
caption leaves open: position, size, rotation, phase of the texture). Lengths are in units of the
shorter side, so the same seed drawn at 128, 64 and 32 px shows the same scene, and the small image
is the area average of the large one up to anti-aliasing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddit_rt.lab.demo.images import Attributes, all_attributes, is_held_out

Array = npt.NDArray[np.float32]

RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.05),
    "yellow": (0.97, 0.87, 0.10),
    "green": (0.10, 0.60, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.12, 0.25, 0.86),
    "purple": (0.56, 0.14, 0.70),
    "black": (0.08, 0.08, 0.08),
}
# Backgrounds are tints: two strengths of white mixed in, so that shapes stand out from them.
_TINT_STRONG, _TINT_WEAK = 0.40, 0.88
OUTLINE_SHADE = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """Size of the images and the ranges that a seed draws from.

    Lengths (`jitter`, `radius`, `outline`, `period`) are fractions of the shorter side; angles
    are in radians.
    """

    height: int = 128
    width: int = 128
    supersample: int = 2
    jitter: float = 0.06
    radius: tuple[float, float] = (0.23, 0.30)
    rotation: float = 0.1
    outline: float = 0.02
    period: tuple[float, float] = (0.23, 0.28)
    shade: float = 0.04

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        check_config(self, "supersample", "radius", "period")


def check_config(config: Any, number: str, *ranges: str) -> None:
    """Check the sizes of a configuration, a number beside them, and its ranges."""
    height, width, count = config.height, config.width, getattr(config, number)
    if min(height, width) < 8 or count < 1:
        raise ValueError(
            f"height, width, {number} are {height}, {width}, {count}; expected sides of at least "
            f"8 px and {number} >= 1"
        )
    for name in ranges:
        low, high = getattr(config, name)
        if not 0 < low <= high < 1:
            raise ValueError(f"{name} is {(low, high)}, expected 0 < low <= high < 1")


def random_attributes(seed: int, index: int, *, held_out: bool = False) -> Attributes:
    """Draw the combination of image `index`, from the training or the held-out combinations."""
    pool = [a for a in all_attributes() if is_held_out(a) == held_out]
    return pool[int(np.random.default_rng([seed, index, 1]).integers(len(pool)))]


def draw_image(attributes: Attributes, config: ImageConfig, seed: int, index: int = 0) -> Array:
    """Draw one image.

    Args:
        attributes: What to draw.
        config: Size and ranges.
        seed: Seed of the series.
        index: Number of the image within the series.

    Returns:
        ``[height, width, 3]`` float32, RGB in [0, 1].
    """
    rng = np.random.default_rng([seed, index, 2])
    x, y = grid_of(config)
    angle = rng.uniform(-config.rotation, config.rotation)
    centre = rng.uniform(-config.jitter, config.jitter, size=2)
    radius = rng.uniform(*config.radius)
    shade = rng.uniform(-config.shade, config.shade, size=(2, 3)).astype(np.float32)
    image = draw_ground(attributes.background, attributes.background_colour, shade[0], rng, config)
    u, v = rotate(x - np.float32(centre[0]), y - np.float32(centre[1]), angle)
    distance = DISTANCES[attributes.shape](u, v, np.float32(radius))
    fill = np.asarray(RGB[attributes.colour], dtype=np.float32) + shade[1]
    image = np.where((distance < 0)[..., None], fill * np.float32(OUTLINE_SHADE), image)
    image = np.where((distance < -config.outline)[..., None], fill, image)
    return np.clip(area_average(image, config.supersample), 0, 1).astype(np.float32)


def draw_ground(
    background: str,
    background_colour: str,
    shade: Array,
    rng: np.random.Generator,
    config: ImageConfig,
) -> Array:
    """A background alone, ``[height * supersample, width * supersample, 3]`` float32, RGB.

    `shade` ``[3]`` is added to its strong tint; `rng` draws period, phase and angle.
    """
    x, y = grid_of(config)
    weight = TEXTURES[background](x, y, rng, config)[..., None]
    tint = np.asarray(RGB[background_colour], dtype=np.float32)
    strong = tint + (1 - tint) * np.float32(_TINT_STRONG) + shade
    weak = tint + (1 - tint) * np.float32(_TINT_WEAK)
    return np.asarray(weak + (strong - weak) * weight, dtype=np.float32)


def draw_series(
    config: ImageConfig, seed: int, start: int, count: int, *, held_out: bool = False
) -> tuple[npt.NDArray[np.uint8], list[Attributes]]:
    """Draw images ``start .. start + count - 1`` of a series.

    Returns:
        ``[count, 3, height, width]`` uint8 RGB, and the attributes of each image.
    """
    drawn = [random_attributes(seed, start + i, held_out=held_out) for i in range(count)]
    return in_bytes(draw_image, drawn, config, seed, start), drawn


def in_bytes(
    draw: Callable[..., Array], drawn: Sequence[Any], config: Any, seed: int, start: int
) -> npt.NDArray[np.uint8]:
    """``[count, 3, ...]`` uint8 of what `draw` gives with channels last, in [0, 1]."""
    samples = [draw(what, config, seed, start + place) for place, what in enumerate(drawn)]
    return np.rint(np.moveaxis(np.stack(samples), -1, 1) * 255).astype(np.uint8, order="C")


def grid_of(config: ImageConfig) -> tuple[Array, Array]:
    """Pixel centres of the supersampled image, origin in the middle, short side of length 1."""
    unit = min(config.height, config.width) * config.supersample
    rows, columns = config.height * config.supersample, config.width * config.supersample
    y = (np.arange(rows, dtype=np.float32) + 0.5 - rows / 2) / unit
    x = (np.arange(columns, dtype=np.float32) + 0.5 - columns / 2) / unit
    grid_x, grid_y = np.meshgrid(x, y)
    return grid_x.astype(np.float32), grid_y.astype(np.float32)


def rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates in axes that are turned by `angle` radians."""
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def area_average(image: Array, factor: int) -> Array:
    """Means over `factor` x `factor` pixels of ``[H, W, 3]``."""
    rows, columns, channels = image.shape
    blocks = image.reshape(rows // factor, factor, columns // factor, factor, channels)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float32)


# Signed distances to the outline (negative inside; beyond a corner only a lower bound).


def _circle(x: Array, y: Array, radius: np.float32) -> Array:
    return np.hypot(x, y) - radius


def _square(x: Array, y: Array, radius: np.float32) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.86) * radius


def _triangle(x: Array, y: Array, radius: np.float32) -> Array:
    # The outward normals point down, and to the upper left and right (y grows downwards).
    y = y - np.float32(0.12) * radius
    slanted = np.float32(math.sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(slanted, y) - np.float32(0.58) * radius


def _star(x: Array, y: Array, radius: np.float32) -> Array:
    # Fold the plane into the half sector between a tip and the next inner corner; there the
    # outline is the one line from (r, 0) to inner * r * (cos 36, sin 36 degrees).
    half_sector, inner = math.pi / 5, 0.48
    tip = np.float32(1.18) * radius
    angle = np.arctan2(x, -y)
    angle = np.abs((angle + half_sector) % (2 * half_sector) - half_sector)
    length = np.hypot(x, y)
    edge_x, edge_y = inner * math.cos(half_sector) - 1, inner * math.sin(half_sector)
    norm = math.hypot(edge_x, edge_y)
    normal_x, normal_y = np.float32(edge_y / norm), np.float32(-edge_x / norm)
    return np.asarray(
        normal_x * (length * np.cos(angle) - tip) + normal_y * length * np.sin(angle),
        dtype=np.float32,
    )


# Textures: weight in [0, 1] of the strong tint at each pixel.


def _plain(x: Array, _y: Array, rng: np.random.Generator, _config: ImageConfig) -> Array:
    return np.full_like(x, rng.uniform(0.7, 1.0))


def _fade(x: Array, y: Array, rng: np.random.Generator, _config: ImageConfig) -> Array:
    _, along = rotate(x, y, rng.uniform(-0.4, 0.4))
    return np.asarray(np.clip(along * 1.1 + 0.5, 0, 1), dtype=np.float32)


def _stripes(x: Array, y: Array, rng: np.random.Generator, config: ImageConfig) -> Array:
    along, _ = rotate(x, y, math.pi / 4 + rng.uniform(-0.15, 0.15))
    phase = along / np.float32(rng.uniform(*config.period)) + np.float32(rng.uniform())
    return np.asarray((phase % 1) < 0.5, dtype=np.float32)


def _dots(x: Array, y: Array, rng: np.random.Generator, config: ImageConfig) -> Array:
    u, v = _lattice(x, y, rng, config)
    return np.asarray(np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.33, dtype=np.float32)


def _checkers(x: Array, y: Array, rng: np.random.Generator, config: ImageConfig) -> Array:
    u, v = _lattice(x, y, rng, config)
    return np.asarray((np.floor(u) + np.floor(v)) % 2, dtype=np.float32)


def _rings(x: Array, y: Array, rng: np.random.Generator, config: ImageConfig) -> Array:
    centre = rng.uniform(-config.jitter, config.jitter, size=2).astype(np.float32)
    length = np.hypot(x - centre[0], y - centre[1])
    phase = length / np.float32(rng.uniform(*config.period)) + np.float32(rng.uniform())
    return np.asarray((phase % 1) < 0.5, dtype=np.float32)


def _lattice(
    x: Array, y: Array, rng: np.random.Generator, config: ImageConfig
) -> tuple[Array, Array]:
    """Coordinates of a slightly turned square lattice, in periods, with a random phase."""
    u, v = rotate(x, y, rng.uniform(-0.1, 0.1))
    period = np.float32(rng.uniform(*config.period))
    phase = rng.uniform(size=2).astype(np.float32)
    return u / period + phase[0], v / period + phase[1]


DISTANCES: dict[str, Callable[[Array, Array, np.float32], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}
TEXTURES: dict[str, Callable[[Array, Array, np.random.Generator, ImageConfig], Array]] = {
    "plain": _plain,
    "fade": _fade,
    "stripes": _stripes,
    "dots": _dots,
    "checkers": _checkers,
    "rings": _rings,
}
