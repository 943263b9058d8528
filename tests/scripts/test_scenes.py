"""The study model: its scenes and captions, and a smoke run of its training."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from ddit_rt.lab.demo import model_path


@pytest.fixture
def scenes() -> Any:
    return import_module("demo_training.draw_scenes")


def test_no_caption_that_is_held_out_is_trained_in_any_wording(scenes: Any) -> None:
    trained = {
        scenes.phrase(scene, phrasing)
        for scene in scenes.all_scenes()
        for phrasing in range(1, scenes.PHRASINGS)
    }
    held_out, seen = (set(scenes.captions_of(held_out=chosen)) for chosen in (True, False))
    assert len(held_out) >= 24
    assert not held_out & trained
    assert seen & trained
    assert not held_out & seen
    assert {len(caption.split()) for caption in held_out} == {3, 4}
    # The encoders' 16 tokens hold the words and, letter by letter, those that they do not know.
    assert max(len(caption.split()) for caption in trained) <= 5


def test_captions_say_what_a_scene_is(scenes: Any) -> None:
    scene = scenes.Scene(count=3, shape="circle", colour="red", background="stripes")
    assert scene.caption == "three red circles on stripes"
    mixed = scenes.Scene(count=2, shape=None, colour=None, background="dots")
    assert mixed.caption == "two shapes on dots"
    said = {scenes.phrase(mixed, phrasing) for phrasing in range(1, scenes.PHRASINGS)}
    assert said <= {"two shapes", "shapes", "dots", "shapes on dots", "two shapes on dots"}
    labels = [tuple(scene.labels) for scene in scenes.all_scenes()]
    assert len(set(labels)) == len(labels)
    assert all(
        0 <= label < size
        for row in labels
        for label, size in zip(row, scenes.SCENE_SIZES.values(), strict=True)
    )


@pytest.mark.parametrize("count", [1, 4])
def test_scenes_show_as_many_shapes_and_hang_on_the_seed_alone(scenes: Any, count: int) -> None:
    config = import_module("demo_training.draw_images").ImageConfig()
    scene = scenes.Scene(count=count, shape="circle", colour="black", background="plain")
    image = scenes.draw_scene(scene, config, seed=1, index=5)
    assert image.shape == (128, 128, 3)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, scenes.draw_scene(scene, config, seed=1, index=5))
    assert np.abs(image - scenes.draw_scene(scene, config, seed=1, index=6)).max() > 0.1
    black = image.max(-1) < 0.15
    smallest, largest = 0.09, 0.24
    assert count * np.pi * smallest**2 * 0.5 < black.mean() < count * np.pi * largest**2


def test_series_draws_the_scenes_that_it_names(scenes: Any) -> None:
    config = import_module("demo_training.draw_images").ImageConfig(height=32, width=64)
    pixels, drawn = scenes.draw_scenes(config, 7, 3, 2)
    assert pixels.shape == (2, 3, 32, 64)
    for place, scene in enumerate(drawn):
        assert scene == scenes.random_scene(7, 3 + place)
        own = scenes.draw_scene(scene, config, 7, 3 + place).transpose(2, 0, 1) * 255
        np.testing.assert_array_equal(pixels[place], np.rint(own).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smoke_run_begins_at_the_demos_weights_and_goes_on(
    train_demo: Callable[..., None], tmp_path: Path
) -> None:
    def trained(*arguments: str) -> dict[str, Any]:
        train_demo("scenes", *arguments)
        return torch.load(tmp_path / "transformer.pt", weights_only=True)

    first = trained("all")
    # The second run goes on from what the first has left, which may have taken any time.
    second = trained("transformer", "--minutes", str(first["spent"] / 60 + 0.01))
    assert 0 < first["step"] < second["step"]
    made = load_file(tmp_path / "export" / "transformer.safetensors")
    base = FluxTransformer2DModel.from_pretrained(model_path(), subfolder="transformer")
    before = base.state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in before.items()}
    apart = max(float((made[name].float() - before[name]).abs().max()) for name in made)
    assert 0 < apart < 0.5  # a few steps away, not begun anew
