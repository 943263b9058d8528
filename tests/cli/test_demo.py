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
    capsys.readouterr()
    assert main(["calibrate", artifact, *model, *fit, "--json"]) == 0
    ((caption, _),) = json.loads(capsys.readouterr().out)["fit"]["evidence"]["prompts"]
    assert " moving " in caption
    prompt = ["--prompt", "a red circle moving left on plain blue", "--step-cache", "magcache:0.1"]
    assert main(["generate", artifact, *model, *prompt, "-o", str(clip), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["pictures"]
    assert made["num_frames"] == 13
    assert clip.stat().st_size > 1000
