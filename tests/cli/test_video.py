"""The commands on a video model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from extras import need
from made_once import Packages
from PIL import Image
from wan_models import wan_pipeline

from ddit_rt.artifact import read_manifest
from ddit_rt.cli import main


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan pipeline, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("wan")
    wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan_artifact(
    tmp_path_factory: pytest.TempPathFactory, wan_folder: Path, packages: Packages
) -> Path:
    """Compiled by the command."""
    path = tmp_path_factory.mktemp("artifact") / "wan.ddit"
    size = ["--height", "64", "--width", "64", "--num-frames", "5", "--patch-sizes", "p,2p"]
    with pytest.MonkeyPatch.context() as patch, packages():
        patch.setenv("DDIT_RT_HOME", str(path.parent / "home"))
        assert main(["compile", str(wan_folder), "-o", str(path), *size]) == 0
    return path


@pytest.fixture
def generate(wan_artifact: Path, wan_folder: Path) -> list[str]:
    """Arguments of a short run."""
    model = ["--model", str(wan_folder), "--trust-code", "--max-sequence-length", "8"]
    steps = ["--steps", "3", "--seed", "1", "--policy", "2p:0.4,p"]
    return ["generate", str(wan_artifact), *model, *steps, "--prompt", "a zebra"]


@pytest.mark.slow
def test_frames_become_pictures_of_a_folder(
    generate: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--negative-prompt", "a cat", "--guidance-interval", "0", "0.7"]
    capsys.readouterr()
    assert main([*generate, "-o", str(tmp_path / "zebra.png"), *more, "--json"]) == 0
    frames = sorted((tmp_path / "zebra").iterdir())
    assert [frame.name for frame in frames] == [f"{index:03d}.png" for index in range(5)]
    with Image.open(frames[0]) as image:
        assert image.size == (64, 64)
    (video,) = json.loads(capsys.readouterr().out)["pictures"]
    assert video["num_frames"] == 5
    assert video["patch_sizes"] == ["2p", "p", "p"]


@pytest.mark.slow
def test_mp4_holds_all_frames_at_their_size(generate: list[str], tmp_path: Path) -> None:
    need("av")
    import av

    path = tmp_path / "zebra.mp4"
    size = ["--num-frames", "9", "--height", "80", "--fps", "8", "--policy", "fine"]
    assert main([*generate, "-o", str(path), *size]) == 0
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        assert (stream.width, stream.height, stream.average_rate) == (64, 80, 8)
        assert sum(1 for _ in container.decode(stream)) == 9


def test_missing_encoder_is_named_before_any_work(
    generate: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert main([*generate, "-o", str(tmp_path / "a.mp4")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "an MP4 needs PyAV" in message
    assert "ddit_rt[video]" in message


def test_sizes_that_the_model_cannot_make_are_exit_2(
    generate: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*generate, "-o", str(tmp_path / "a.png"), "--num-frames", "6"]) == 2
    assert "such as 5 or 9" in capsys.readouterr().err


def test_eval_refuses_videos(
    wan_artifact: Path, wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need("torchmetrics")
    (tmp_path / "prompts.txt").write_text("a zebra\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert main(["eval", str(wan_artifact), "--model", str(wan_folder), *prompts]) == 2
    message = capsys.readouterr().err
    assert "ddit-rt eval compares images" in message
    assert "ddit-rt calibrate" in message


@pytest.mark.slow
def test_calibrated_plans_are_for_the_call_and_run(
    wan_artifact: Path,
    wan_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need("matplotlib", "torchmetrics")
    path, trace = tmp_path / "wan.ddit", tmp_path / "trace.json"
    shutil.copytree(wan_artifact, path)
    (tmp_path / "prompts.txt").write_text("a zebra\na fox\na vase\na cat\n")
    call = ["--model", str(wan_folder), "--trust-code", "--max-sequence-length", "8"]
    call += ["--steps", "8", "--num-frames", "9", "--height", "96", "--guidance-scale", "4"]
    call += ["--negative-prompt", "a dog"]
    few = ["--calibration-prompts", "2", "--held-out-prompts", "2", "--pictures", "75"]
    target = ["--speedup", "1.4", "--cost", "tokens", "--prompts", str(tmp_path / "prompts.txt")]
    capsys.readouterr()
    assert main(["calibrate", str(path), *call, *few, *target]) == 0
    captured = capsys.readouterr()
    assert "with no step cache but those that need no fit" in captured.err
    # Three latent frames of 12 x 8; p is 2.
    assert "held-out prompts; full resolution takes 576.0 tokens" in captured.out
    (calibration,) = read_manifest(path).calibrations
    evidence = calibration.evidence
    assert evidence["arguments"] == {
        "height": 96,
        "width": 64,
        "num_frames": 9,
        "guidance_scale": 4.0,
        "negative_prompt": "a dog",
        "max_sequence_length": 8,
    }
    assert evidence["step_costs"] == {"p": 72.0, "2p": 18.0}
    assert (tmp_path / "wan-calibration" / "pareto-8.png").is_file()
    preset = ["--policy", "balanced", "--prompt", "a zebra", "-o", str(tmp_path / "a.png")]
    assert main(["generate", str(path), *call, *preset, "--trace", str(trace)]) == 0
    run = json.loads(trace.read_text())["pictures"][0]["trace"]
    plan = calibration.presets["balanced"]
    assert len(run["steps"]) == plan.num_inference_steps
    assert any(plan.label in note for note in run["notes"])


def test_training_adapters_is_refused(
    wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a zebra\n")
    source = ["--self", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert main(["train", str(wan_folder), *source]) == 2
    assert "no patch adapters for WanTransformer3DModel" in capsys.readouterr().err


def test_info_counts_the_videos_state(
    wan_artifact: Path, wan_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["info", str(wan_artifact), "--model", str(wan_folder)]) == 0
    text = capsys.readouterr().out
    assert "64 x 64, 5 frames, 512 text tokens, 50 steps, batch 1, guided" in text
    # Four latents, two velocities of UniPC, a detail and a mean over 2 x 2.
    assert "7.25 latents" in text
