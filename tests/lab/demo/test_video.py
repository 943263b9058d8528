"""The video demo around a tiny random Wan pipeline."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import need
from PIL import Image
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt.lab.demo.figures import grid_frames
from ddit_rt.lab.demo.plans import Plan
from ddit_rt.lab.demo.report import summary_table
from ddit_rt.lab.demo.run import DemoConfig, compare, run_demo, video_demo
from ddit_rt.lab.measure.fidelity import video_fidelity
from ddit_rt.lab.measure.video_file import write_mp4

PROMPTS = ("a red circle moving left on plain blue", "a red circle moving up on blue dots")
STEPS = 6


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("video")


@pytest.fixture(scope="module")
def clip_report(plans: tuple[Plan, ...], out: Path) -> dict[str, Any]:
    """The report of a tiny run, whose files are in `out`."""
    need("av", "matplotlib", "torchmetrics")
    engine = ddit_rt.compile(
        wan_pipeline(),
        height=64,
        width=64,
        num_frames=5,
        patch_sizes=("p", "2p"),
        backend="eager",
        progress=False,
    )
    config = video_demo(
        out=out,
        prompts=PROMPTS,
        steps=STEPS,
        height=64,
        width=64,
        num_frames=5,
        repeats=1,
    )
    compiling = {"compile_seconds": 1.0, "load_seconds": 0.5, "artifact_bytes": 10}
    return compare(engine, plans, config, compiling)


def read_video(path: Path) -> np.ndarray:
    """Frames ``[F, H, W, 3]``."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_report_is_what_the_file_holds(clip_report: dict[str, Any], out: Path) -> None:
    assert json.loads((out / "report.json").read_text()) == clip_report
    assert {path.name for path in out.iterdir()} == {"clips.mp4", "report.json", "timeline.png"}
    assert [run["policy"] for run in clip_report["runs"]] == ["fine", "static", "dynamic"]
    assert "flicker: mean error" in summary_table(clip_report)


def test_all_fine_is_the_reference_of_quality_and_speed(clip_report: dict[str, Any]) -> None:
    fine = clip_report["runs"][0]
    assert fine["psnr"] is None
    assert fine["ssim"] == pytest.approx(1)
    assert fine["flicker"] == 0
    assert fine["speedup_over_fine"] == 1
    # A byte may round the other way: one level in 255 is 48 dB.
    psnr = clip_report["reference"]["psnr"]
    assert psnr is None or psnr > 48
    for run in clip_report["runs"]:
        assert run["speedup_over_fine"] == pytest.approx(
            fine["seconds_denoise"] / run["seconds_denoise"]
        )


def test_every_frame_has_its_figures(clip_report: dict[str, Any]) -> None:
    static = clip_report["runs"][1]
    for prompt in static["prompts"]:
        assert len(prompt["ssim_frames"]) == len(prompt["psnr_frames"]) == 5
        assert prompt["ssim"] == pytest.approx(np.mean(prompt["ssim_frames"]))
        assert len(prompt["trace"]["steps"]) == STEPS


def test_video_is_readable_and_shows_every_plan(clip_report: dict[str, Any], out: Path) -> None:
    frames = read_video(out / "clips.mp4")
    assert len(frames) == 3 * 5
    _, height, width, _ = frames.shape
    # Three rows of videos of 192 px and two columns, beside labels and below captions.
    assert height >= 3 * 192
    assert width >= 2 * 192
    with Image.open(out / "timeline.png") as image:
        assert min(image.size) >= 200


def test_written_frames_come_back_in_order(tmp_path: Path) -> None:
    need("av")
    levels = (20, 120, 220)
    frames = [np.full((48, 64, 3), level, dtype=np.uint8) for level in levels]
    write_mp4(tmp_path / "grey.mp4", frames, 8)
    read = read_video(tmp_path / "grey.mp4")
    assert read.shape == (3, 48, 64, 3)
    # Lossy, in limited-range YUV: a flat grey is off by a few levels.
    assert np.abs(read.mean(axis=(1, 2, 3)) - levels).max() < 5


def test_odd_sides_are_refused(tmp_path: Path) -> None:
    need("av")
    with pytest.raises(ValueError, match="frames of 41 x 64; an MP4 needs even sides"):
        write_mp4(tmp_path / "odd.mp4", [np.zeros((41, 64, 3), dtype=np.uint8)], 8)


def test_grid_puts_plans_below_and_prompts_beside_each_other(clip_report: dict[str, Any]) -> None:
    names = ("diffusers", "fine", "static", "dynamic")
    levels = {name: (40 * row, 40 * row + 20) for row, name in enumerate(names)}
    videos = {
        name: [np.full((2, 8, 8, 3), (level, 200, 0), dtype=np.uint8) for level in row]
        for name, row in levels.items()
    }
    for row in videos.values():
        for video in row:
            video[1, ..., 2] = 255  # the second frame differs
    frames = grid_frames(clip_report, videos, loops=2)
    assert len(frames) == 4
    assert all(side % 16 == 0 for side in frames[0].shape[:2])
    assert np.array_equal(frames[0], frames[2])

    def corner(level: int, blue: int) -> np.ndarray:
        found = np.argwhere((frames[blue // 255] == (level, 200, blue)).all(axis=-1))
        assert len(found) > 150 * 150
        return found.min(axis=0)

    places = {name: [corner(level, 0) for level in row] for name, row in levels.items()}
    assert np.array_equal(corner(levels["fine"][1], 255), places["fine"][1])
    for above, below in pairwise(names):
        assert places[below][0][0] > places[above][0][0] + 150
    for left, right in places.values():
        assert right[1] > left[1] + 150
        assert right[0] == left[0]


def test_flicker_ignores_a_constant_offset_and_counts_alternation() -> None:
    need("torchmetrics")
    still = np.full((4, 16, 16, 3), 100, dtype=np.uint8)
    brighter = still + 10
    flickering = still.copy()
    flickering[1::2] += 10
    closeness = video_fidelity([brighter, flickering], [still, still])
    assert closeness.flicker == pytest.approx((0, 10 / 255))


def test_missing_encoder_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"PyAV .*ddit_rt\[video\]"):
        run_demo(None, video_demo(out=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_bad_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got steps=0"):
        DemoConfig(out=tmp_path, steps=0)
