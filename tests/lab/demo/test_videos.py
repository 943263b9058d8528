"""The procedural videos: deterministic, described exactly by their captions."""

import numpy as np
import pytest
from demo_training.draw_videos import VideoConfig, draw_video, draw_videos

from ddit_rt.lab.demo.prompts import VIDEO_PROMPTS, held_out_video_prompts
from ddit_rt.lab.demo.videos import (
    VideoAttributes,
    all_video_attributes,
    is_held_out_video,
    parse_video_caption,
)


def centre_of_red(frame: np.ndarray) -> np.ndarray:
    """Mean (x, y) of what is clearly red."""
    rows, columns = np.nonzero((frame[..., 0] > 0.7) & (frame[..., 1] < 0.3))
    return np.array([columns.mean(), rows.mean()])


def test_captions_invert_for_every_combination() -> None:
    everything = all_video_attributes()
    assert len(everything) == len({a.caption for a in everything}) == 1152
    assert [parse_video_caption(a.caption) for a in everything] == everything


def test_what_is_no_caption_is_refused() -> None:
    for caption in ("", "a red circle on plain blue", "a red circle moving left"):
        with pytest.raises(ValueError, match="expected e.g. 'a red circle moving left on blue"):
            parse_video_caption(caption)
    with pytest.raises(ValueError, match="direction is 'north', expected one of left"):
        VideoAttributes(
            shape="circle", colour="red", direction="north", ground="dots", ground_colour="red"
        )


def test_draw_clip_repeats_for_equal_seeds_and_varies_with_the_index() -> None:
    attributes = parse_video_caption("a red triangle moving up on blue checkers")
    config = VideoConfig(height=32, width=48, frames=5)
    first = draw_video(attributes, config, seed=3)
    assert first.shape == (5, 32, 48, 3)
    assert first.dtype == np.float32
    assert np.array_equal(first, draw_video(attributes, config, seed=3))
    assert not np.array_equal(first, draw_video(attributes, config, seed=3, index=1))


@pytest.mark.parametrize(
    ("direction", "step"),
    [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))],
)
def test_shape_moves_as_its_caption_says(direction: str, step: tuple[int, int]) -> None:
    attributes = parse_video_caption(f"a red circle moving {direction} on plain green")
    config = VideoConfig()
    centres = [centre_of_red(frame) for frame in draw_video(attributes, config, seed=1)]
    speed = np.diff(centres, axis=0) / config.height
    along = speed @ np.array(step)
    low, high = config.speed
    # A centre of whole pixels is off by a small part of a pixel, which is 1/64 of the side.
    assert np.all(along > low - 0.004)
    assert np.all(along < high + 0.004)
    assert np.abs(speed - along[:, None] * step).max() < 0.004


def test_ground_stands_still() -> None:
    video = draw_video(
        parse_video_caption("a black square moving left on red stripes"), VideoConfig(), seed=2
    )
    assert np.ptp(video[:, :8], axis=0).max() == 0


def test_draw_clip_shows_the_same_scene_at_every_size() -> None:
    attributes = parse_video_caption("a blue circle moving down on green dots")
    large = draw_video(attributes, VideoConfig(), seed=5)
    small = draw_video(attributes, VideoConfig(height=32, width=32), seed=5)
    averaged = large.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    # They differ by anti-aliasing only, which is confined to the few pixels on an edge.
    assert np.abs(averaged - small).mean() < 0.02


def test_fewer_frames_are_the_middle_of_the_same_movement() -> None:
    attributes = parse_video_caption("a red square moving right on plain yellow")
    long = draw_video(attributes, VideoConfig(frames=13), seed=7)
    short = draw_video(attributes, VideoConfig(frames=5), seed=7)
    # Positions are computed in a different order: a few roundings of float32.
    assert np.abs(long[4:9] - short).max() < 1e-4


def test_series_do_not_depend_on_how_they_are_cut() -> None:
    config = VideoConfig(height=16, width=16, frames=5)
    whole, drawn = draw_videos(config, seed=0, start=0, count=6)
    tail, _ = draw_videos(config, seed=0, start=4, count=2)
    assert whole.shape == (6, 3, 5, 16, 16)
    assert np.array_equal(whole[4:], tail)
    assert not any(is_held_out_video(a) for a in drawn)
    _, unseen = draw_videos(config, seed=0, start=0, count=4, held_out=True)
    assert all(is_held_out_video(a) for a in unseen)


def test_config_rejects_empty_ranges_and_no_frames() -> None:
    with pytest.raises(ValueError, match="speed is"):
        VideoConfig(speed=(0.4, 0.3))
    with pytest.raises(ValueError, match="frames are 64, 64, 0"):
        VideoConfig(frames=0)


def test_demo_prompts_are_captions_that_training_never_saw() -> None:
    assert set(VIDEO_PROMPTS) <= set(held_out_video_prompts())
    assert sum("plain" in prompt for prompt in VIDEO_PROMPTS) == len(VIDEO_PROMPTS) // 2
