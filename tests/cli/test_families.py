"""Commands on models whose own forward runs the steps: no command knows a family."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import longcat_models
import pytest
from chroma_models import tiny_pipeline
from flux_edit_models import img2img
from made_once import Packages
from PIL import Image
from text_encoders import add_text_encoders, t5_model, t5_words

from ddit_rt.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is:FutureWarning"),
]


def call(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_info_generate_and_profile_run_a_model_that_tells_no_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: Packages, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline, words = tiny_pipeline(), t5_words()
    pipeline.register_modules(tokenizer=words, text_encoder=t5_model(len(words)))
    pipeline.save_pretrained("model")
    size = ["--height", 64, "--width", 96]
    with packages():
        call("compile", "model", "-o", "a.ddit", *size, "--patch-sizes", "p,2p")
    of_model = ["a.ddit", "--model", "model"]

    call("info", *of_model)
    assert "chroma" in capsys.readouterr().out.lower()

    guided = ["--negative-prompt", "c", "--guidance-scale", 3]
    call("generate", *of_model, "--prompt", "a", "--steps", 6, "--policy", "2p:0.5,p", *guided)
    with Image.open("out.png") as image:
        assert image.size == (96, 64)

    profile = ["--tool", "torch", "--prompt", "a", "--warm-up", 1, "--out", "profile"]
    call("profile", *of_model, "--steps", 6, "--policy", "2p:0.5,p", *profile)
    report = read(Path("profile/profile.json"))
    rows = {(row["patch"], row["phase"]): row for row in report["runs"][0]["rows"]}
    assert rows["p", "model"]["calls"] == rows["2p", "model"]["calls"] == 3
    assert report["settings"]["latents"] == [1, 4, 8, 12]


@pytest.mark.slow
def test_generate_hands_a_picture_to_a_pipeline_that_starts_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: Packages, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    add_text_encoders(img2img()).save_pretrained("model")
    Image.effect_noise((96, 64), 80).save("noise.png")
    Image.new("RGB", (96, 64), "red").save("red.png")
    Path("text.png").write_text("no picture")
    with packages():
        call("compile", "model", "-o", "a.ddit", "--height", 64, "--width", 96)
    ask = ["generate", "a.ddit", "--model", "model", "--prompt", "a", "--steps", 4, "--seed", 1]
    for name in ("noise", "red"):
        start = ["--image", f"{name}.png", "--strength", 0.5]
        call(*ask, *start, "-o", f"from-{name}.png")
    assert Path("from-noise.png").read_bytes() != Path("from-red.png").read_bytes()
    capsys.readouterr()
    assert main([*map(str, ask), "--image", "text.png"]) == 2
    assert "text.png is no image that can be read" in capsys.readouterr().err


@pytest.mark.slow
def test_sound_is_written_as_long_as_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: Packages, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    longcat_models.tiny_pipeline().save_pretrained("model")
    with packages():
        call("compile", "model", "-o", "a.ddit")
    capsys.readouterr()
    ask = ["generate", "a.ddit", "--model", "model", "--prompt", "a", "--steps", 4]
    lengths = []
    for asked in (1, 2):
        call(*ask, "--audio-duration-s", asked, "--policy", "2p:0.5,p", "--json")
        lengths.append(json.loads(capsys.readouterr().out)["pictures"][0]["audio_seconds"])
    with wave.open("out.wav") as file:
        assert file.getframerate() == longcat_models.RATE
        assert file.getnframes() / file.getframerate() == lengths[1] == 2 * lengths[0]
        samples = file.readframes(file.getnframes())
    assert len(set(samples)) > 16  # not silence
    assert main([*map(str, ask), "-o", "a.png"]) == 2
    assert "the name must end in .wav" in capsys.readouterr().err

    of_model = ["a.ddit", "--model", "model", "--audio-duration-s", 0.5, "--steps", 6]
    Path("prompts.txt").write_text("aa\nbb\ncc\ndd\n")
    few = ["--calibration-prompts", 2, "--held-out-prompts", 2, "--pictures", 65]
    few += ["--prompts", "prompts.txt", "--cost", "tokens"]
    assert main(["calibrate", *map(str, [*of_model, *few]), "--min-ssim", "0.5"]) == 2
    assert "compared by STFT similarity; give min_stft" in capsys.readouterr().err
    call("calibrate", *of_model, *few, "--min-stft", 0.1)
    assert "STFT similarity" in capsys.readouterr().out
    call("calibrate", *of_model, *few[:2], "--prompts", "prompts.txt", "--cache", "magcache")
    some = ["--prompts", "prompts.txt", "--limit", 2, "--cost", "tokens"]
    assert main(["eval", *map(str, [*of_model, *some]), "--clip-model", "x"]) == 2
    assert "got --clip-model for a model of sound" in capsys.readouterr().err
    call("eval", *of_model, *some, "--policy", "2p:0.5,p", "--out", "found")
    assert "stft" in capsys.readouterr().out
    assert "<audio controls" in Path("found/report.html").read_text()
    call("profile", *of_model, "--tool", "torch", "--policy", "2p:0.5,p", "--warm-up", 1)
    assert read(Path("profile_out/profile.json"))["settings"]["latents"] == [1, 4, 1, 50]
