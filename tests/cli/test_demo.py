from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddit_rt.cli import main


@pytest.mark.slow
def test_demo_writes_its_files_and_reports_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    short = ["--steps", "12", "--repeats", "1", "--keep-artifact"]
    assert main(["demo", "--out", str(out), *short, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert [run["policy"] for run in report["runs"]] == ["fine", "static", "dynamic"]
    names = {path.name for path in out.iterdir()}
    assert names == {"demo.ddit", "grid.png", "timeline.png", "report.json"}
    assert report["reference"]["ssim"] > 0.999


def test_bad_count_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path), "--steps", "0"]) == 2
    assert "steps=0" in capsys.readouterr().err


@pytest.mark.slow
def test_video_demo_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "video"
    short = ["--steps", "8", "--repeats", "1", "--json"]
    assert main(["demo", "--video", "--out", str(out), *short]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert {path.name for path in out.iterdir()} == {"clips.mp4", "timeline.png", "report.json"}
    assert report["reference"]["ssim"] > 0.999
