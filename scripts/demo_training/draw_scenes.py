"""Scenes of several drawings, free in place, size and angle, and captions that leave most open.

Where a caption says all that is in a picture, trajectories are nearly straight. These say little:
"two fruits", "something red", "stripes", or nothing.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddit_rt.lab.demo.images import BACKGROUND_COLOURS, BACKGROUNDS
from demo_training.artwork import COLOURS, GROUPS, Drawing, counted, load_drawings
from demo_training.draw_images import Array, ImageConfig, area_average, draw_ground, in_bytes

NUMBERS = ("one", "two", "three", "four")
NOUNS = tuple(GROUPS)
ANY = "drawing"
PHRASINGS = 8
_PLURALS = {noun: noun if noun == "fish" else f"{noun}s" for noun in (*NOUNS, ANY)}
WORDS_OF_DRAWINGS = tuple(dict.fromkeys((*_PLURALS, *_PLURALS.values())))
_SINGULARS = {plural: noun for noun, plural in _PLURALS.items()}
_HELD_OUT_WORDS, _HELD_OUT_ONE_IN = 3, 8
_LEAST_DRAWINGS = 3
_SMALLEST, _LARGEST, _SHRINKS = 0.15, (0.4, 0.3, 0.26, 0.23), 0.93
_INSIDE, _APART, _TRIES, _TURN = 0.85, 0.85, 30, 20.0
Place = tuple[float, float, float]
"""Centre and radius, with the shorter side as the unit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What may be said about a scene.

    Attributes:
        count: Drawings, 1 to 4.
        noun: What they are, if all are alike; None: they are of any group.
        colour: Likewise.
        background: Texture of the ground.
    """

    count: int
    noun: str | None
    colour: str | None
    background: str

    @property
    def caption(self) -> str:
        """The caption that says most, e.g. ``three red fruits on stripes``."""
        return phrase(self, 0)

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """Class indices in the order count, noun, colour, background; the last one for None."""
        noun = len(NOUNS) if self.noun is None else NOUNS.index(self.noun)
        colour = len(COLOURS) if self.colour is None else COLOURS.index(self.colour)
        return self.count - 1, noun, colour, BACKGROUNDS.index(self.background)


SCENE_SIZES = {
    "count": len(NUMBERS),
    "noun": len(NOUNS) + 1,
    "colour": len(COLOURS) + 1,
    "background": len(BACKGROUNDS),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig(ImageConfig):
    """`ImageConfig`, of which `radius`, `outline`, `jitter` and `rotation` are not those of scenes.

    Attributes:
        drawings: The file that the stage `artwork` leaves.
    """

    drawings: pathlib.Path


@functools.cache
def all_scenes() -> tuple[Scene, ...]:
    """Every combination that there are drawings for; one drawing is of a group."""
    return tuple(
        Scene(count=count, noun=noun, colour=colour, background=background)
        for count, noun, colour, background in itertools.product(
            range(1, len(NUMBERS) + 1), (*NOUNS, None), (*COLOURS, None), BACKGROUNDS
        )
        if (count > 1 or noun is not None) and _is_drawn(noun, colour)
    )


def _is_drawn(noun: str | None, colour: str | None) -> bool:
    """Whether there are a few drawings of a group in a colour."""
    return noun is None or colour is None or counted()[noun].get(colour, 0) >= _LEAST_DRAWINGS


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
    noun = scene.noun or ANY
    noun = _PLURALS[noun] if scene.count > 1 else noun
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
        noun = _SINGULARS.get(word, word)
        if word in NUMBERS:
            found["count"] = NUMBERS.index(word)
        elif noun in NOUNS:
            found["noun"] = NOUNS.index(noun)
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


def random_scene(config: SceneConfig, seed: int, index: int) -> Scene:
    """What may be said of scene `index` of a series: half are of one group, half of one colour."""
    rng = np.random.default_rng([seed, index, 3])
    count = int(rng.integers(1, len(NUMBERS) + 1))
    alike = (rng.random(2) < 0.5) | (count == 1)
    drawings = load_drawings(config.drawings)
    noun = _one_of(NOUNS, rng) if alike[0] else None
    of_noun = [one for one in drawings if noun in (None, one.group)]
    colour = of_noun[int(rng.integers(len(of_noun)))].colour if alike[1] else None
    if not _is_drawn(noun, colour):
        colour = None
    return Scene(count=count, noun=noun, colour=colour, background=_one_of(BACKGROUNDS, rng))


def draw_scene(scene: Scene, config: SceneConfig, seed: int, index: int = 0) -> Array:
    """Draw a scene.

    Args:
        scene: What to draw; the rest is the seed's.
        config: Size, ranges and drawings.
        seed: Seed of the series.
        index: Number of the scene within the series.

    Returns:
        ``[height, width, 3]`` float32, RGB in [0, 1].
    """
    rng = np.random.default_rng([seed, index, 4])
    chosen = [
        drawing
        for drawing in load_drawings(config.drawings)
        if scene.noun in (None, drawing.group) and scene.colour in (None, drawing.colour)
    ]
    shade = rng.uniform(-config.shade, config.shade, size=3).astype(np.float32)
    image = draw_ground(scene.background, _one_of(BACKGROUND_COLOURS, rng), shade, rng, config)
    unit = min(config.height, config.width) * config.supersample
    for x, y, radius in _places(scene.count, config, rng):
        stamp = _stamp(chosen[int(rng.integers(len(chosen)))], 2 * radius * unit, rng)
        top = round(y * unit + (len(image) - len(stamp)) / 2)
        left = round(x * unit + (image.shape[1] - len(stamp)) / 2)
        _lay(image, stamp, top, left)
    return np.clip(area_average(image, config.supersample), 0, 1).astype(np.float32)


def _stamp(drawing: Drawing, side: float, rng: np.random.Generator) -> Array:
    """A drawing, slightly turned and perhaps mirrored, ``[side, side, 4]`` in [0, 1]."""
    image, length = Image.fromarray(drawing.pixels), max(2, round(side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(float(rng.uniform(-_TURN, _TURN)), Image.Resampling.BICUBIC)
    image = image.resize((length, length), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(image, dtype=np.float32) / 255


def _lay(image: Array, stamp: Array, top: int, left: int) -> None:
    """Lay a stamp over an image, in place; what lies outside is cut off."""
    rows, columns = image.shape[:2]
    inside = stamp[max(0, -top) : rows - top, max(0, -left) : columns - left]
    top, left = max(0, top), max(0, left)
    under = image[top : top + len(inside), left : left + inside.shape[1]]
    under += (inside[..., :3] - under) * inside[..., 3:]


def draw_scenes(
    config: SceneConfig, seed: int, start: int, count: int
) -> tuple[npt.NDArray[np.uint8], list[Scene]]:
    """Draw scenes ``start .. start + count - 1`` of a series.

    Returns:
        ``[count, 3, height, width]`` uint8 RGB, and what may be said of each.
    """
    drawn = [random_scene(config, seed, start + place) for place in range(count)]
    return in_bytes(draw_scene, drawn, config, seed, start), drawn


def _places(count: int, config: ImageConfig, rng: np.random.Generator) -> list[Place]:
    """Places that hardly overlap; they shrink where there is no room."""
    unit = min(config.height, config.width)
    largest, found = _LARGEST[count - 1], list[Place]()
    for _ in range(count):
        for _ in range(_TRIES):
            radius = float(rng.uniform(_SMALLEST, max(largest, _SMALLEST)))
            x, y = (
                float(rng.uniform(-0.5, 0.5)) * (side / unit - 2 * _INSIDE * radius)
                for side in (config.width, config.height)
            )
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
