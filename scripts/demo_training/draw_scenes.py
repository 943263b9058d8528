"""Scenes of several shapes, free in place, size and angle, and captions that leave most open.

Where a caption says all that is in a picture, trajectories are nearly straight. These say little:
"two circles", "something red", "stripes", or nothing.
"""

import dataclasses
import functools
import itertools
import math
import zlib

import numpy as np
import numpy.typing as npt

from ddit_rt.lab.demo.images import BACKGROUND_COLOURS, BACKGROUNDS, COLOURS, SHAPES
from demo_training.draw_images import (
    DISTANCES,
    OUTLINE_SHADE,
    RGB,
    Array,
    ImageConfig,
    area_average,
    draw_ground,
    grid_of,
    in_bytes,
    rotate,
)

NUMBERS = ("one", "two", "three", "four", "five")
PHRASINGS = 8
_HELD_OUT_WORDS, _HELD_OUT_ONE_IN = 3, 8
_MARGIN, _RADII, _SHRINKS = 0.16, (0.11, 0.24), 0.93
_APART, _TRIES = 0.85, 30
_ROOM = 1.4
"""Half the side of the square around any shape, over its radius."""
Place = tuple[float, float, float]
"""Centre and radius, with the shorter side as the unit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What may be said about a scene.

    Attributes:
        count: Shapes, 1 to 5.
        shape: Which one, if all are alike; None: every one is drawn by itself.
        colour: Likewise.
        background: Texture of the ground.
    """

    count: int
    shape: str | None
    colour: str | None
    background: str

    @property
    def caption(self) -> str:
        """The caption that says most, e.g. ``three red circles on stripes``."""
        return phrase(self, 0)

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """Class indices in the order count, shape, colour, background; the last one for None."""
        shape = len(SHAPES) if self.shape is None else SHAPES.index(self.shape)
        colour = len(COLOURS) if self.colour is None else COLOURS.index(self.colour)
        return self.count - 1, shape, colour, BACKGROUNDS.index(self.background)


SCENE_SIZES = {
    "count": len(NUMBERS),
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "background": len(BACKGROUNDS),
}


def all_scenes() -> list[Scene]:
    """Every combination; a single shape has a kind and a colour."""
    return [
        Scene(count=count, shape=shape, colour=colour, background=background)
        for count, shape, colour, background in itertools.product(
            range(1, len(NUMBERS) + 1), (*SHAPES, None), (*COLOURS, None), BACKGROUNDS
        )
        if count > 1 or (shape is not None and colour is not None)
    ]


def phrase(scene: Scene, phrasing: int) -> str:
    """A caption of a scene: the one asked for or, where that is held out, the next that is not.

    Args:
        scene: The scene.
        phrasing: 0, which says most and may be held out, to `PHRASINGS` - 1.
    """
    said = _phrasings(scene)
    if phrasing == 0:
        return said[0]
    places = ((phrasing + turn) % PHRASINGS for turn in range(PHRASINGS))
    return next(said[place] for place in places if not is_held_out(said[place]))


def _phrasings(scene: Scene) -> tuple[str, ...]:
    number = NUMBERS[scene.count - 1]
    noun = (scene.shape or "shape") + "s" * (scene.count > 1)
    coloured = noun if scene.colour is None else f"{scene.colour} {noun}"
    ground = scene.background
    return (
        f"{number} {coloured} on {ground}",
        f"{number} {coloured}",
        f"{number} {noun}",
        f"{number} {noun} on {ground}",
        noun,
        ground if scene.colour is None else f"something {scene.colour}",
        ground,
        f"{coloured} on {ground}",
    )


def is_held_out(caption: str) -> bool:
    """Whether training never shows a caption: one in eight of those of three words and more."""
    long = len(caption.split()) >= _HELD_OUT_WORDS
    return long and zlib.crc32(caption.encode()) % _HELD_OUT_ONE_IN == 0


def said(caption: str) -> dict[str, int]:
    """What a caption says: class indices as in `Scene.labels`, of the attributes that it names."""
    found = {}
    for word in caption.split():
        noun = word.removesuffix("s")
        if word in NUMBERS:
            found["count"] = NUMBERS.index(word)
        elif noun in SHAPES:
            found["shape"] = SHAPES.index(noun)
        elif word in COLOURS:
            found["colour"] = COLOURS.index(word)
        elif word in BACKGROUNDS:
            found["background"] = BACKGROUNDS.index(word)
    return found


@functools.cache
def captions_of(*, held_out: bool) -> tuple[str, ...]:
    """Captions of three and four words that training never shows, or does; in a mixed order."""
    said = {caption for scene in all_scenes() for caption in _phrasings(scene)}
    chosen = [
        caption
        for caption in said
        if len(caption.split()) in (_HELD_OUT_WORDS, _HELD_OUT_WORDS + 1)
        and is_held_out(caption) == held_out
    ]
    return tuple(sorted(chosen, key=lambda caption: zlib.crc32(caption[::-1].encode())))


def random_scene(seed: int, index: int) -> Scene:
    """What may be said of scene `index` of a series: half are of one shape, half of one colour."""
    rng = np.random.default_rng([seed, index, 3])
    count = int(rng.integers(1, len(NUMBERS) + 1))
    alike = (rng.random(2) < 0.5) | (count == 1)
    return Scene(
        count=count,
        shape=_one_of(SHAPES, rng) if alike[0] else None,
        colour=_one_of(COLOURS, rng) if alike[1] else None,
        background=_one_of(BACKGROUNDS, rng),
    )


def draw_scene(scene: Scene, config: ImageConfig, seed: int, index: int = 0) -> Array:
    """Draw a scene.

    Args:
        scene: What to draw; the rest is the seed's.
        config: Size and ranges; `radius`, `jitter` and `rotation` are not those of scenes.
        seed: Seed of the series.
        index: Number of the scene within the series.

    Returns:
        ``[height, width, 3]`` float32, RGB in [0, 1].
    """
    rng = np.random.default_rng([seed, index, 4])
    shade = rng.uniform(-config.shade, config.shade, size=3).astype(np.float32)
    tint = _one_of(BACKGROUND_COLOURS, rng)
    image = draw_ground(scene.background, tint, shade, rng, config)
    x, y = grid_of(config)
    for centre_x, centre_y, radius in _places(scene.count, config, rng):
        distance_of = DISTANCES[scene.shape or _one_of(SHAPES, rng)]
        fill = np.asarray(RGB[scene.colour or _one_of(COLOURS, rng)], dtype=np.float32)
        angle = rng.uniform(-math.pi, math.pi)
        rows, columns = (
            slice(*np.searchsorted(line, [middle - _ROOM * radius, middle + _ROOM * radius]))
            for line, middle in ((y[:, 0], centre_y), (x[0], centre_x))
        )
        near = image[rows, columns]  # a view: nothing of the shape lies beyond
        u, v = rotate(
            x[rows, columns] - np.float32(centre_x), y[rows, columns] - np.float32(centre_y), angle
        )
        distance = distance_of(u, v, np.float32(radius))
        near[distance < 0] = fill * np.float32(OUTLINE_SHADE)
        near[distance < -config.outline] = fill
    return np.clip(area_average(image, config.supersample), 0, 1).astype(np.float32)


def draw_scenes(
    config: ImageConfig, seed: int, start: int, count: int
) -> tuple[npt.NDArray[np.uint8], list[Scene]]:
    """Draw scenes ``start .. start + count - 1`` of a series.

    Returns:
        ``[count, 3, height, width]`` uint8 RGB, and what may be said of each.
    """
    drawn = [random_scene(seed, start + place) for place in range(count)]
    return in_bytes(draw_scene, drawn, config, seed, start), drawn


def _places(count: int, config: ImageConfig, rng: np.random.Generator) -> list[Place]:
    """Shapes that hardly overlap; they shrink where there is no room."""
    unit = min(config.height, config.width)
    spans = [side / unit - _MARGIN for side in (config.width, config.height)]
    (smallest, largest), found = _RADII, list[Place]()
    for _ in range(count):
        for _ in range(_TRIES):
            x, y = (float(rng.uniform(-0.5, 0.5)) * span for span in spans)
            radius = float(rng.uniform(smallest, max(largest, smallest)))
            if all(
                math.hypot(x - other[0], y - other[1]) > _APART * (radius + other[2])
                for other in found
            ):
                break
            largest *= _SHRINKS
        found.append((x, y, radius))
    return found


def _one_of(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
