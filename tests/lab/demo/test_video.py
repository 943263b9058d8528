"""The video demo around a tiny random Wan pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import need
from PIL import Image
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt.lab.demo.mosaic import side_by_side
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
def clip_report(out: Path) -> dict[str, Any]:
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
    plans = (
        Plan(name="fine", label="full resolution", policy=ddit_rt.FinePolicy()),
        Plan(name="static", label="static plan", policy=ddit_rt.StaticPolicy("2p:0.5,p")),
        Plan(name="dynamic", label="dynamic", policy=ddit_rt.DDiTPolicy(tau={"2p": 1.0})),
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


def test_all_fine_is_the_reference_of_quality_and_speed(clip_report: dict[str, Any]) -> None:
    fine = clip_report["runs"][0]
    assert fine["psnr"] is None
    assert fine["ssim"] == pytest.approx(1)
    assert fine["flicker"] == 0
    assert fine["speedup_over_fine"] == 1
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


def test_diffusers_made_the_same_clips_up_to_rounding(clip_report: dict[str, Any]) -> None:
    # A byte may round the other way: one level in 255 is 48 dB.
    psnr = clip_report["reference"]["psnr"]
    assert psnr is None or psnr > 48


def test_video_is_readable_and_shows_every_plan(clip_report: dict[str, Any], out: Path) -> None:
    frames = read_video(out / "clips.mp4")
    assert len(frames) == 3 * 5
    _, height, width, _ = frames.shape
    # Three rows of videos of 192 px and two columns, beside labels and below captions.
    assert height >= 3 * 192
    assert width >= 2 * 192
    with Image.open(out / "timeline.png") as image:
        assert min(image.size) >= 200


def test_summary_has_a_line_per_way(clip_report: dict[str, Any]) -> None:
    table = summary_table(clip_report)
    for label in ("diffusers", "full resolution", "static plan", "dynamic"):
        assert any(line.startswith(label) for line in table.splitlines())


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


def test_side_by_side_puts_rows_below_and_prompts_beside_each_other() -> None:
    colours = {"one": ((200, 0, 0), (0, 200, 0)), "two": ((0, 0, 200), (200, 0, 200))}
    videos = {
        label: [np.full((2, 8, 8, 3), colour, dtype=np.uint8) for colour in row]
        for label, row in colours.items()
    }
    frames = side_by_side(PROMPTS, videos, side=64, loops=2)
    assert len(frames) == 4
    assert all(side % 16 == 0 for side in frames[0].shape[:2])

    def corner(label: str, column: int) -> np.ndarray:
        found = np.argwhere((frames[0] == colours[label][column]).all(axis=-1))
        assert len(found) == 64 * 64
        return found.min(axis=0)

    first = corner("one", 0)
    assert tuple(corner("two", 0) - first) == (72, 0)
    assert tuple(corner("one", 1) - first) == (0, 72)
    assert tuple(corner("two", 1) - first) == (72, 72)


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
