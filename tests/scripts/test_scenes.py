"""The study model: its drawings, scenes and captions, and a smoke run of its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from ddit_rt.lab.demo import model_path

_COLOURS = {"red": (220, 20, 20), "blue": (20, 40, 220), "white": (240, 240, 240)}


@pytest.fixture
def scenes() -> Any:
    return import_module("demo_training.draw_scenes")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with packages as npm unpacks them: discs of each group in both styles."""
    artwork = import_module("demo_training.artwork")
    fluent, noto = (
        tmp_path / "packages" / name.strip("@").replace("/", "_") / "package"
        for name in (artwork.FLUENT, artwork.NOTO)
    )
    small = noto / "img" / "google" / "64"
    for folder in (fluent / "assets", small):
        folder.mkdir(parents=True)
    entries = []
    for group, starts in artwork.GROUPS.items():
        for name, colour in _COLOURS.items():
            code = f"1{len(entries):04x}"
            # Only one of the packages has the sign that asks for a picture.
            _disc(256, colour).save(fluent / "assets" / f"{code}-fe0f.webp", lossless=True)
            _disc(64, colour).save(small / f"{code}.png")
            entry = {
                "subcategory": f"{starts[0]}x",
                "unified": code.upper(),
                "image": f"{code}.png",
            }
            entries.append({**entry, "name": f"{name} {group}"})
    entries.append({"subcategory": "country-flag", "unified": "1F1E6", "image": "1f1e6.png"})
    (noto / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path


def _disc(side: int, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((0, 0, side - 1, side - 1), (*colour, 255))
    return image


@pytest.fixture
def config(scenes: Any, work: Path, train_demo: Callable[..., None]) -> Any:
    train_demo("scenes", "artwork")
    return scenes.SceneConfig(drawings=work / "drawings.npz", height=64, width=64)


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
    scene = scenes.Scene(count=3, noun="fruit", colour="red", background="stripes")
    assert scene.caption == "three red fruits on stripes"
    mixed = scenes.Scene(count=2, noun=None, colour=None, background="dots")
    assert mixed.caption == "two drawings on dots"
    said = {scenes.phrase(mixed, phrasing) for phrasing in range(1, scenes.PHRASINGS)}
    assert said <= {"two drawings", "drawings", "dots", "drawings on dots", "two drawings on dots"}
    labels = [tuple(scene.labels) for scene in scenes.all_scenes()]
    assert len(set(labels)) == len(labels)
    assert all(
        0 <= label < size
        for row in labels
        for label, size in zip(row, scenes.SCENE_SIZES.values(), strict=True)
    )


@pytest.mark.parametrize("colour", [*_COLOURS, None])
def test_a_drawing_has_the_colour_of_half_of_it(colour: str | None) -> None:
    artwork = import_module("demo_training.artwork")
    image = _disc(64, _COLOURS[colour or "red"])
    if colour is None:
        for place, other in enumerate(_COLOURS.values()):
            image.paste((*other, 255), (place * 21, 0, place * 21 + 21, 64))
    assert artwork.colour_of(image) == colour


def test_artwork_keeps_both_styles_of_what_captions_name(config: Any) -> None:
    artwork = import_module("demo_training.artwork")
    drawings = artwork.load_drawings(config.drawings)
    assert len(drawings) == 2 * len(artwork.GROUPS) * len(_COLOURS)
    assert {one.group for one in drawings} == set(artwork.GROUPS)
    assert {one.colour for one in drawings} == set(_COLOURS)
    assert {one.pixels.shape for one in drawings} == {(96, 96, 4), (64, 64, 4)}
    table = json.loads((config.drawings.parent / "drawings.json").read_text(encoding="utf-8"))
    assert table == {group: dict.fromkeys(_COLOURS, 2) for group in artwork.GROUPS}
    with pytest.raises(ValueError, match="run the stage 'artwork' first"):
        artwork.load_drawings(config.drawings / "none")


def test_without_npm_the_packages_are_asked_for_by_name(
    train_demo: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="install Node.js"):
        train_demo("scenes", "artwork")


@pytest.mark.parametrize("count", [1, 4])
def test_scenes_show_as_many_drawings_and_hang_on_the_seed_alone(
    scenes: Any, config: Any, count: int
) -> None:
    scene = scenes.Scene(count=count, noun="fruit", colour="blue", background="plain")
    image = scenes.draw_scene(scene, config, seed=1, index=9)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, scenes.draw_scene(scene, config, seed=1, index=9))
    assert np.abs(image - scenes.draw_scene(scene, config, seed=1, index=6)).max() > 0.1
    blue = np.abs(image - np.divide(_COLOURS["blue"], 255)).max(-1) < 0.15
    smallest, largest = 0.15, 0.4
    # A drawing that is turned lies wholly inside its square, discs overlap a little.
    assert count * np.pi * smallest**2 * 0.5 < blue.mean() < count * np.pi * largest**2


def test_series_draws_the_scenes_that_it_names(scenes: Any, config: Any) -> None:
    pixels, drawn = scenes.draw_scenes(config, 7, 3, 2)
    assert pixels.shape == (2, 3, 64, 64)
    for place, scene in enumerate(drawn):
        assert scene == scenes.random_scene(config, 7, 3 + place)
        own = scenes.draw_scene(scene, config, 7, 3 + place).transpose(2, 0, 1) * 255
        np.testing.assert_array_equal(pixels[place], np.rint(own).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smoke_run_begins_at_the_demos_weights_and_goes_on(
    train_demo: Callable[..., None], work: Path
) -> None:
    def trained(*arguments: str) -> dict[str, Any]:
        train_demo("scenes", *arguments)
        return torch.load(work / "transformer.pt", weights_only=True)

    first = trained("all")
    # The second run goes on from what the first has left, which may have taken any time.
    second = trained("transformer", "--minutes", str(first["spent"] / 60 + 0.01))
    assert 0 < first["step"] < second["step"]
    made, base = (FluxPipeline.from_pretrained(at) for at in (work / "export", model_path()))
    for part in ("transformer", "vae"):
        own, before = (getattr(one, part).state_dict() for one in (made, base))
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in before.items()}
        apart = max(float((own[name] - before[name]).abs().max()) for name in own)
        assert 0 < apart < 0.5  # a few steps away, not begun anew
    # No file says where the training machine keeps the model that it began with.
    kept = [file.read_text(encoding="utf-8") for file in (work / "export").rglob("*.json")]
    assert not any(str(model_path()) in text for text in kept)
    shipped = FluxPipeline.from_pretrained(import_module("study_models").MODEL)
    assert made.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    assert made.tokenizer_2.get_vocab() == shipped.tokenizer_2.get_vocab()
