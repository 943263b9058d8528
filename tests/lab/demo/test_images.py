"""The procedural images: deterministic, described exactly by their captions."""

import numpy as np
import pytest
from demo_training.draw_images import ImageConfig, draw_image, draw_series

from ddit_rt.lab.demo.images import Attributes, all_attributes, is_held_out, parse_caption
from ddit_rt.lab.demo.prompts import DEMO_PROMPTS, held_out_prompts


def test_captions_invert_for_every_combination() -> None:
    everything = all_attributes()
    assert len(everything) == len({a.caption for a in everything}) == 768
    assert [parse_caption(a.caption) for a in everything] == everything


def test_what_is_no_caption_is_refused() -> None:
    for caption in ("", "a red circle", "a red circle in plain blue"):
        with pytest.raises(ValueError, match="expected e.g. 'a red circle on blue stripes'"):
            parse_caption(caption)
    with pytest.raises(ValueError, match="colour is 'mauve', expected one of red"):
        Attributes(shape="star", colour="mauve", background="dots", background_colour="red")


def test_draw_image_repeats_for_equal_seeds_and_varies_with_the_index() -> None:
    attributes = parse_caption("a red star on blue checkers")
    config = ImageConfig(height=48, width=64)
    first = draw_image(attributes, config, seed=3)
    assert first.shape == (48, 64, 3)
    assert first.dtype == np.float32
    assert np.array_equal(first, draw_image(attributes, config, seed=3))
    assert not np.array_equal(first, draw_image(attributes, config, seed=3, index=1))


def test_draw_image_shows_the_same_scene_at_every_size() -> None:
    attributes = parse_caption("a blue circle on green rings")
    large = draw_image(attributes, ImageConfig(), seed=5)
    small = draw_image(attributes, ImageConfig(height=32, width=32), seed=5)
    averaged = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    # They differ by anti-aliasing only, which is confined to the few pixels on an edge.
    assert np.abs(averaged - small).mean() < 0.02


def test_series_keeps_held_out_combinations_apart_however_it_is_cut() -> None:
    config = ImageConfig(height=16, width=16)
    images, drawn = draw_series(config, seed=0, start=0, count=64)
    assert images.shape == (64, 3, 16, 16)
    assert not any(is_held_out(a) for a in drawn)
    tail, _ = draw_series(config, seed=0, start=62, count=2)
    assert np.array_equal(images[62:], tail)
    _, unseen = draw_series(config, seed=0, start=0, count=8, held_out=True)
    assert all(is_held_out(a) for a in unseen)


def test_config_rejects_empty_ranges() -> None:
    with pytest.raises(ValueError, match="radius is"):
        ImageConfig(radius=(0.4, 0.3))


def test_prompts_can_be_parsed_and_half_of_the_demo_ones_are_plain() -> None:
    assert len(DEMO_PROMPTS) == 8
    assert sum(parse_caption(p).background == "plain" for p in DEMO_PROMPTS) == 4
    assert all(is_held_out(parse_caption(p)) for p in held_out_prompts())
    assert len(set(held_out_prompts(24))) == 24
    with pytest.raises(ValueError, match="count is 0"):
        held_out_prompts(0)
