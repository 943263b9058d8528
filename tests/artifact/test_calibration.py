from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ddit_rt.artifact import PRESETS, CalibratedPlan, Calibration, Manifest, calibration_for
from ddit_rt.blocks import TokenRanges
from ddit_rt.errors import ArtifactError
from ddit_rt.policies import CacheFit


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
    for name in ("calibrations", "step_cache", "cache_fits"):
        del raw[name]
    raw["schema_version"] = 1
    text = json.dumps(raw, indent=1, sort_keys=True) + "\n"
    old = Manifest.from_json(text)
    assert old.calibrations == ()
    assert old.to_json() == text
    calibrated = old.with_calibration(calibration())
    assert calibrated.schema_version == 2
    assert Manifest.from_json(calibrated.to_json()) == calibrated


def test_old_manifest_with_a_calibration_was_edited(manifest: Manifest) -> None:
    for version, later in ((1, "'calibrations', 'step_cache', 'cache_fits'"), (2, "'step_cache'")):
        raw = {**json.loads(manifest.to_json()), "schema_version": version}
        with pytest.raises(
            ArtifactError, match=rf"unknown entries \[{later}.* in schema {version}"
        ):
            Manifest.from_json(json.dumps(raw))


def test_a_fit_of_a_step_cache_takes_the_place_of_one_of_its_kind(manifest: Manifest) -> None:
    fits = [
        CacheFit(kind="teacache", values=(1.0, 2.0), source="first", evidence={"points": 3}),
        CacheFit(kind="magcache", values=(1.0, 0.9), source="other"),
        CacheFit(kind="teacache", values=(3.0,), source="second"),
    ]
    for fit in fits:
        manifest = manifest.with_cache_fit(fit)
    assert manifest.cache_fits == (fits[1], fits[2])
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_an_older_manifest_with_a_fit_is_of_the_version_that_knows_it(manifest: Manifest) -> None:
    raw = json.loads(manifest.to_json())
    del raw["step_cache"], raw["cache_fits"]
    old = Manifest.from_json(json.dumps({**raw, "schema_version": 2}))
    assert old.with_calibration(calibration()).schema_version == 2
    fitted = old.with_cache_fit(CacheFit(kind="teacache", values=(1.0,), source="a test"))
    assert fitted.schema_version == 3
    assert Manifest.from_json(fitted.to_json()) == fitted


def test_plan_with_a_step_cache_makes_a_manifest_of_version_4(manifest: Manifest) -> None:
    raw = json.loads(manifest.to_json())
    third = Manifest.from_json(json.dumps({**raw, "schema_version": 3}))
    plain = third.with_calibration(calibration())
    assert plain.schema_version == 3
    assert "step_cache" not in json.loads(plain.to_json())["calibrations"][0]["presets"]["fast"]
    assert Manifest.from_json(plain.to_json()) == plain
    entry = calibration()
    cache = {"step_cache": "TeaCache", "threshold": 0.3}
    fast = dataclasses.replace(entry.presets["fast"], step_cache=cache)
    cached = plain.with_calibration(
        dataclasses.replace(entry, presets={**entry.presets, "fast": fast})
    )
    assert cached.schema_version == 4
    assert Manifest.from_json(cached.to_json()) == cached
    again = Manifest.from_json(cached.to_json()).calibrations[0].presets["fast"]
    assert again.step_cache == cache
    raw = {**json.loads(cached.to_json()), "schema_version": 3}
    with pytest.raises(ArtifactError, match=r"\['step_cache'\] of a calibrated plan in schema 3"):
        Manifest.from_json(json.dumps(raw))


def test_plan_with_levels_of_its_own_makes_a_manifest_of_version_6(manifest: Manifest) -> None:
    plain = manifest.with_calibration(calibration())
    assert plain.schema_version == manifest.schema_version
    assert "sigmas" not in json.loads(plain.to_json())["calibrations"][0]["front"][0]
    entry = calibration()
    fast = dataclasses.replace(entry.presets["fast"], sigmas=(1.0, 0.7, 0.3))
    placed = manifest.with_calibration(
        dataclasses.replace(entry, presets={**entry.presets, "fast": fast})
    )
    assert placed.schema_version == 6
    again = Manifest.from_json(placed.to_json())
    assert again == placed
    assert again.calibrations[0].presets["fast"].sigmas == (1.0, 0.7, 0.3)
    raw = {**json.loads(placed.to_json()), "schema_version": 5}
    with pytest.raises(ArtifactError, match=r"\['sigmas'\] of a calibrated plan in schema 5"):
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
