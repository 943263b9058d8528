from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from extras import need
from made_once import Packages

from ddit_rt.cli import main


@pytest.fixture(autouse=True)
def compiled_once(packages: Packages) -> Iterator[None]:
    """The embedded models are the same in all of them."""
    with packages():
        yield


@pytest.mark.slow
def test_demo_writes_its_files_and_reports_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need("matplotlib", "torchmetrics")
    out = tmp_path / "demo"
    short = ["--steps", "12", "--repeats", "1", "--keep-artifact"]
    assert main(["demo", "--out", str(out), *short, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert [run["policy"] for run in report["runs"]] == ["fine", "static", "dynamic"]
    names = {path.name for path in out.iterdir()}
    assert names == {"demo.ddit", "grid.png", "timeline.png", "report.json"}
    assert report["reference"]["ssim"] > 0.999


@pytest.mark.slow
def test_video_demo_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("av", "matplotlib", "torchmetrics")
    out = tmp_path / "video"
    short = ["--steps", "8", "--repeats", "1", "--json"]
    assert main(["demo", "--video", "--out", str(out), *short]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert {path.name for path in out.iterdir()} == {"clips.mp4", "timeline.png", "report.json"}
    assert report["reference"]["ssim"] > 0.999


@pytest.mark.slow
def test_video_model_has_a_name_for_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled at its own size; a step cache is fitted on its own captions, and runs."""
    need("av")
    artifact, clip = str(tmp_path / "clip.ddit"), tmp_path / "clip.mp4"
    assert main(["compile", "demo-video", "-o", artifact]) == 0
    model = ["--model", "demo-video", "--steps", "8"]
    fit = ["--cache", "magcache", "--calibration-prompts", "1"]
    assert main(["calibrate", artifact, *model, *fit]) == 0
    capsys.readouterr()
    prompt = ["--prompt", "a red circle moving left on plain blue", "--step-cache", "magcache:0.1"]
    assert main(["generate", artifact, *model, *prompt, "-o", str(clip), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["pictures"]
    assert made["num_frames"] == 13
    assert clip.stat().st_size > 1000


@pytest.mark.slow
def test_video_model_is_calibrated_on_its_own_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need("av", "matplotlib", "torchmetrics")
    artifact, trace = str(tmp_path / "clip.ddit"), tmp_path / "trace.json"
    assert main(["compile", "demo-video", "-o", artifact]) == 0
    call = ["--model", "demo-video", "--steps", "8", "--num-frames", "5", "--guidance-scale", "3"]
    few = ["--calibration-prompts", "1", "--held-out-prompts", "2", "--pictures", "65"]
    capsys.readouterr()
    assert main(["calibrate", artifact, *call, *few, "--min-ssim", "0.8", "--json"]) == 0
    calibration = json.loads(capsys.readouterr().out)["calibration"]
    evidence = calibration["evidence"]
    assert all(" moving " in text for text, _ in evidence["prompts"])
    assert evidence["arguments"]["num_frames"] == 5
    assert set(evidence["step_costs"]) == {"p", "2p", "4p"}
    # A trained model's videos lose little by a step or two less, whichever plan it is.
    assert calibration["presets"]["balanced"]["ssim"] >= 0.8
    assert evidence["held_out"][evidence["winner"]]["ssim"] > 0.7
    preset = ["--prompt", evidence["held_out_prompts"][0][0], "--policy", "balanced"]
    output = ["-o", str(tmp_path / "clip.mp4"), "--trace", str(trace)]
    assert main(["generate", artifact, *call, *preset, *output]) == 0
    (made,) = json.loads(trace.read_text())["pictures"]
    assert made["num_frames"] == 5
    label = calibration["presets"]["balanced"]["label"]
    assert any(label in note for note in made["trace"]["notes"])
