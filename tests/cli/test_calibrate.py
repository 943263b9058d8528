"""`ddit-rt calibrate` on a tiny artifact, and its presets in `generate` and `info`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from extras import need
from PIL import Image

from ddit_rt.artifact import PRESETS, is_trusted, read_manifest
from ddit_rt.cli import main
from ddit_rt.lab.plans.bench import EngineBench

SMALL = ["--calibration-prompts", "2", "--held-out-prompts", "2", "--pictures", "90"]


@pytest.fixture(scope="module")
def options(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a zebra\n\na fox\na vase\na cat\n")
    model = ["--model", str(model_folder), "--trust-code", "--max-sequence-length", "8"]
    return [*model, "--prompts", str(prompts), *SMALL]


@pytest.fixture(scope="module")
def calibrated(
    artifact: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A calibrated copy for 8 steps, its report beside it."""
    need("matplotlib", "torchmetrics")
    folder = tmp_path_factory.mktemp("calibrated")
    path = folder / "tiny.ddit"
    shutil.copytree(artifact, path)
    target = ["--steps", "8", "--speedup", "1.4", "--cost", "tokens"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIT_RT_HOME", str(folder / "home"))
        assert main(["calibrate", str(path), *options, *target]) == 0
        assert is_trusted(read_manifest(path).digest)
    return path


@pytest.mark.slow
def test_artifact_holds_plans_and_evidence(calibrated: Path, artifact: Path) -> None:
    manifest = read_manifest(calibrated)
    (calibration,) = manifest.calibrations
    assert manifest.packages == read_manifest(artifact).packages
    assert calibration.num_inference_steps == 8
    assert calibration.cost_unit == "tokens"
    assert calibration.target == {"speedup": 1.4}
    assert set(calibration.presets) == set(PRESETS)
    # All fine is 8 steps of 24 tokens; 2p takes 6.
    assert calibration.front[0].cost == 8 * 24
    assert calibration.presets["balanced"].cost <= 8 * 24 / 1.4
    evidence = calibration.evidence
    texts = [text for text, _ in evidence["prompts"] + evidence["held_out_prompts"]]
    assert sorted(texts) == ["a cat", "a fox", "a vase", "a zebra"]
    assert {"cpu", "threads"} <= evidence["machine"].keys()
    assert "torch" in evidence["versions"]
    assert evidence["arguments"] == {
        "height": 32,
        "width": 48,
        "max_sequence_length": 8,
        "guidance_scale": 3.5,  # of the pipeline's call, which was not told another
    }
    assert evidence["makes"] == "image"
    assert {entry["kind"] for entry in evidence["candidates"]} >= {"fine", "steps", "static"}
    assert evidence["winner"] in evidence["held_out"]
    assert evidence["pictures"]["total"] <= 90


def test_report_lies_beside_the_artifact(calibrated: Path) -> None:
    folder = calibrated.with_name("tiny-calibration")
    report = json.loads((folder / "calibration-8.json").read_text())
    assert report["schema_version"] == 3
    assert all("policy" in one for one in report["evidence"]["candidates"])
    costs = [plan["cost"] for plan in report["front"]]
    assert costs == sorted(costs, reverse=True)
    with Image.open(folder / "pareto-8.png") as image:
        assert image.width > 500
    assert "balanced" in (folder / "front-8.md").read_text()
    (measured,) = folder.glob("measured-8-*.jsonl")
    assert measured.read_text().startswith('{"of": "tables"')


def test_same_calibration_again_measures_nothing(
    calibrated: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.ddit"
    shutil.copytree(calibrated, path)
    shutil.copytree(calibrated.with_name("tiny-calibration"), tmp_path / "tiny-calibration")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan is measured again")

    monkeypatch.setattr(EngineBench, "_generate", refuse)
    monkeypatch.setattr(EngineBench, "confirm", refuse)
    target = ["--steps", "8", "--speedup", "1.4", "--cost", "tokens"]
    assert main(["calibrate", str(path), *options, *target]) == 0
    assert read_manifest(path).calibrations == read_manifest(calibrated).calibrations


def generate(path: Path, model: Path, tmp_path: Path, *extra: str) -> int:
    arguments = ["--model", str(model), "--trust-code", "--max-sequence-length", "8"]
    picture = ["--prompt", "a zebra", "-o", str(tmp_path / "a.png"), "--seed", "1"]
    return main(["generate", str(path), *arguments, *picture, *extra])


@pytest.mark.parametrize("choice", ["balanced", "0.5"])
def test_generate_runs_what_was_calibrated(
    calibrated: Path, model_folder: Path, tmp_path: Path, choice: str
) -> None:
    trace = tmp_path / "trace.json"
    extra = ["--steps", "8", "--policy", choice, "--trace", str(trace)]
    assert generate(calibrated, model_folder, tmp_path, *extra) == 0
    (calibration,) = read_manifest(calibrated).calibrations
    plan = calibration.plan(choice if choice in PRESETS else float(choice))
    data = json.loads(trace.read_text())
    run = data["pictures"][0]["trace"]
    assert len(run["steps"]) == plan.num_inference_steps
    assert any(plan.label in note for note in run["notes"])
    assert data["policy"] == {"calibrated": choice if choice in PRESETS else float(choice)}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "6", "--policy", "balanced"], "calibrated only for [8] steps"),
        (["--steps", "8", "--policy", "2"], "got patch_policy=2.0"),
    ],
)
def test_generate_refuses_what_was_not_calibrated(
    calibrated: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    assert generate(calibrated, model_folder, tmp_path, *extra) == 2
    assert message in capsys.readouterr().err


def test_generate_from_an_artifact_without_calibration(
    artifact: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(artifact, model_folder, tmp_path, "--policy", "balanced") == 2
    assert "not calibrated at all; run `ddit-rt calibrate" in capsys.readouterr().err


def test_info_names_the_presets(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(calibrated)]) == 0
    text = capsys.readouterr().out
    assert "calibrated   8 steps, speedup 1.4: quality " in text


@pytest.mark.slow
def test_second_step_count_joins_the_first(
    calibrated: Path, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "two.ddit"
    shutil.copytree(calibrated, path)
    target = ["--steps", "5", "--min-ssim", "0.2", "--json", "--out", str(tmp_path / "report")]
    assert main(["calibrate", str(path), *options, *target]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["calibration"]["cost_unit"] == "ms"
    # Too few steps for a coarse one between warm-up and tail: steps at p alone are left.
    kinds = {entry["kind"] for entry in data["calibration"]["evidence"]["candidates"]}
    assert kinds == {"fine", "steps", "cached"}
    assert (tmp_path / "report" / "pareto-5.png").is_file()
    assert [c.num_inference_steps for c in read_manifest(path).calibrations] == [5, 8]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        pytest.param(
            ["--speedup", "50"], "no plan reaches speedup=50; the nearest", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--budget-ms", "1e8"], "there is nothing to calibrate", marks=pytest.mark.slow
        ),
        (["--budget-ms", "5", "--cost", "tokens"], "a budget in ms needs cost ms"),
        (["--speedup", "2", "--steps", "1"], "fewer than 2 steps"),
        (["--speedup", "2", "--cache", "teacache"], "not allowed with"),
        ([], "--speedup --min-ssim --min-stft --budget-ms --cache --spectrum is required"),
    ],
)
def test_bad_request_is_exit_2_and_changes_nothing(
    artifact: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    need("matplotlib", "torchmetrics")
    before = (artifact / "manifest.json").read_bytes()
    assert main(["calibrate", str(artifact), *options, "--steps", "8", *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert (artifact / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_a_cache_fit_is_stored_used_and_told(
    artifact: Path,
    options: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, trace = tmp_path / "tiny.ddit", tmp_path / "trace.json"
    shutil.copytree(artifact, path)
    extra = ["--steps", "8", "--step-cache", "magcache:0.5", "--trace", str(trace)]
    assert generate(path, model_folder, tmp_path, *extra) == 2
    assert "no magcache" in capsys.readouterr().err
    fit_it = ["calibrate", str(path), *options, "--steps", "8", "--cache", "magcache", "--json"]
    assert main(fit_it) == 0
    told = json.loads(capsys.readouterr().out)["fit"]
    (fit,) = read_manifest(path).cache_fits
    assert (fit.kind, list(fit.values)) == ("magcache", told["values"])
    assert [text for text, _ in fit.evidence["prompts"]] == ["a zebra", "a fox"]
    assert {"torch", "diffusers"} <= fit.evidence["versions"].keys()
    assert generate(path, model_folder, tmp_path, *extra, "--policy", "fine") == 0
    run = json.loads(trace.read_text())["pictures"][0]["trace"]
    assert run["reused"] > 0
    assert main(["info", str(path)]) == 0
    assert "magcache: fitted on this model: 2 prompts, 8 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_measured_spectrum_is_stored_used_and_told(
    artifact: Path,
    options: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model of random weights makes latents as white as its noise, which is refused."""
    path, trace = tmp_path / "tiny.ddit", tmp_path / "trace.json"
    shutil.copytree(artifact, path)
    command = ["calibrate", str(path), *options, "--steps", "4", "--spectrum", "--json"]
    assert main(command) == 2
    assert "got power that rises with the frequency" in capsys.readouterr().err
    monkeypatch.setattr("ddit_rt.lab.calibrate.cache_fit.power_law", lambda _: (0.5, 1.2, 0.01))
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)["fit"]
    (fit,) = read_manifest(path).cache_fits
    assert (fit.kind, list(fit.values)) == ("spectrum", told["values"])
    extra = ["--steps", "4", "--policy", "spectral:0.3", "--trace", str(trace)]
    assert generate(path, model_folder, tmp_path, *extra) == 0
    run = json.loads(trace.read_text())["pictures"][0]["trace"]
    assert any("spectrum fitted on this model: 2 prompts" in note for note in run["notes"])


@pytest.mark.slow
def test_search_has_step_caches_where_there_is_a_fit(
    artifact: Path,
    options: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need("matplotlib", "torchmetrics")
    path, trace = tmp_path / "tiny.ddit", tmp_path / "trace.json"
    shutil.copytree(artifact, path)
    target = [*options, "--steps", "8", "--speedup", "1.4", "--cost", "tokens"]
    assert main(["calibrate", str(path), *target]) == 0
    assert "with no step cache but those that need no fit" in capsys.readouterr().err
    assert main(["calibrate", str(path), *options, "--steps", "8", "--cache", "teacache"]) == 0
    capsys.readouterr()
    assert main(["calibrate", str(path), *target]) == 0
    captured = capsys.readouterr()
    assert "no step cache" not in captured.err
    assert "<- taken" in captured.out
    manifest = read_manifest(path)
    assert manifest.schema_version in (4, 6)
    (calibration,) = manifest.calibrations
    evidence = calibration.evidence
    assert {entry["kind"] for entry in evidence["candidates"]} >= {"steps", "static", "cached"}
    assert evidence["step_cache_costs"]["TeaCache"]["p reused"] == 0
    cached = [index for index, plan in enumerate(calibration.front) if plan.step_cache]
    speeds = [index / 100 for index in range(101)]
    place, speed = next(
        (i, s) for i in cached for s in speeds if calibration.plan(s) == calibration.front[i]
    )
    extra = ["--steps", "8", "--policy", str(speed), "--trace", str(trace)]
    assert generate(path, model_folder, tmp_path, *extra) == 0
    run = json.loads(trace.read_text())["pictures"][0]["trace"]
    assert calibration.front[place].label in run["notes"][-2]
    cache = calibration.front[place].step_cache
    assert cache is not None
    assert f"step cache: {cache['step_cache']}" in run["notes"][-1]
