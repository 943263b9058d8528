"""Procedural videos of the demo's captions.

A video is a function of its attributes, a `VideoConfig` (size and ranges) and a seed (what the
caption leaves open). Words, colours and textures are those of `draw_images`. Lengths are in units
of the shorter side and speed is per frame, so the same seed at 64, 32 and 16 px shows the same
scene, and fewer frames show the middle part of the same movement.
"""

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from ddit_rt.lab.demo.videos import (
    STEPS,
    VideoAttributes,
    all_video_attributes,
    is_held_out_video,
)
from demo_training.draw_images import (
    DISTANCES,
    OUTLINE_SHADE,
    RGB,
    Array,
    ImageConfig,
    area_average,
    check_config,
    draw_ground,
    in_bytes,
    rotate,
)


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
        check_config(self, "frames", "radius", "speed")


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
    return in_bytes(draw_video, drawn, config, seed, start), drawn


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
