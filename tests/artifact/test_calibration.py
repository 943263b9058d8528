from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ddit_rt.artifact import (
    PRESETS,
    CalibratedPlan,
    Calibration,
    Manifest,
    TokenRanges,
    calibration_for,
)
from ddit_rt.errors import ArtifactError


def plan(speedup: float) -> CalibratedPlan:
    return CalibratedPlan(
        kind="static",
        label=f"{speedup}x",
        policy={"policy": "StaticPolicy", "plan": ["2p", "p"]},
        num_inference_steps=24,
        cost=100 / speedup,
        speedup=speedup,
        ssim=1 / speedup,
        psnr=None,
    )


def calibration(steps: int = 24) -> Calibration:
    front = tuple(plan(speedup) for speedup in (1.0, 2.0, 4.0))
    return Calibration(
        num_inference_steps=steps,
        cost_unit="ms",
        target={"speedup": 2.0},
        presets=dict(zip(PRESETS, front, strict=True)),
        front=front,
        evidence={"seed": 3},
    )


@pytest.fixture
def manifest(transformer: Any) -> Manifest:
    return Manifest.describe(
        transformer, project_version="1.2.3", family="flux", ranges=TokenRanges(), buckets=()
    )


def test_manifest_round_trip(manifest: Manifest) -> None:
    calibrated = manifest.with_calibration(calibration())
    again = Manifest.from_json(calibrated.to_json())
    assert again == calibrated
    assert again.digest == calibrated.digest != manifest.digest


def test_one_calibration_per_step_count(manifest: Manifest) -> None:
    newer = dataclasses.replace(calibration(24), target={"min_ssim": 0.9})
    for entry in (calibration(28), calibration(24), newer):
        manifest = manifest.with_calibration(entry)
    assert manifest.calibrations == (newer, calibration(28))


def test_old_manifest_keeps_its_text_and_so_its_trust(manifest: Manifest) -> None:
    raw = json.loads(manifest.to_json())
    del raw["calibrations"]
    raw["schema_version"] = 1
    text = json.dumps(raw, indent=1, sort_keys=True) + "\n"
    old = Manifest.from_json(text)
    assert old.calibrations == ()
    assert old.to_json() == text
    calibrated = old.with_calibration(calibration())
    assert calibrated.schema_version == 2
    assert Manifest.from_json(calibrated.to_json()) == calibrated


def test_old_manifest_with_a_calibration_was_edited(manifest: Manifest) -> None:
    raw = {**json.loads(manifest.to_json()), "schema_version": 1}
    with pytest.raises(ArtifactError, match="unknown entries .'calibrations'. in schema 1"):
        Manifest.from_json(json.dumps(raw))


def test_damaged_calibration_is_refused(manifest: Manifest) -> None:
    raw = json.loads(manifest.with_calibration(calibration()).to_json())
    del raw["calibrations"][0]["presets"]["fast"]
    with pytest.raises(ArtifactError, match="needs the presets"):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("choice", "speedup"),
    [("quality", 1.0), ("fast", 4.0), (0, 1.0), (0.01, 2.0), (0.5, 2.0), (0.51, 4.0), (1, 4.0)],
)
def test_plan_of_a_preset_or_a_speed(choice: str | float, speedup: float) -> None:
    assert calibration().plan(choice).speedup == speedup


@pytest.mark.parametrize("choice", ["slow", -0.1, 1.1, float("nan")])
def test_no_plan_for_another_choice(choice: str | float) -> None:
    with pytest.raises(ValueError, match="got the (preset|speed)"):
        calibration().plan(choice)


def test_calibration_for_names_what_there_is() -> None:
    both = (calibration(24), calibration(28))
    assert calibration_for(both, 28).num_inference_steps == 28
    with pytest.raises(ValueError, match=r"for 12 steps .* only for \[24, 28\] steps"):
        calibration_for(both, 12)
    with pytest.raises(ValueError, match="not calibrated at all"):
        calibration_for((), 12)
