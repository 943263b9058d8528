"""Plans of a tiny model of sound: calibrated, evaluated, profiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from extras import need
from longcat_models import tiny_pipeline
from models import seeded
from profiles import ceilings, profiled

import ddit_rt
from ddit_rt import Engine, MagCache, NoCache, StaticPolicy
from ddit_rt.lab.calibrate import CalibrationConfig, Prompt, calibrate
from ddit_rt.lab.calibrate.cache_fit import fit_cache
from ddit_rt.lab.calibrate.report import summary, write_report
from ddit_rt.lab.evaluate import run as evaluation
from ddit_rt.lab.evaluate.config import EvaluationConfig
from ddit_rt.lab.evaluate.metrics import sound_metrics
from ddit_rt.lab.evaluate.preferences import Study
from ddit_rt.lab.measure.sound_file import read_wav
from ddit_rt.lab.plans.bench import EngineBench
from ddit_rt.lab.profile.report import report_of, text_of
from ddit_rt.lab.profile.subject import subject_of

STEPS = 8
TEXTS = ("aabb", "ccdd", "eeff", "ghgh")
CALL = {"audio_duration_s": 0.5}
HALF = StaticPolicy("2p:0.5,p")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return ddit_rt.compile(tiny_pipeline(), backend="eager", progress=False)


def config(**fields: Any) -> CalibrationConfig:
    given: dict[str, Any] = {"request": {"min_stft": 0.3}, "prompts": TEXTS, "cost_unit": "tokens"}
    small = {"calibration_prompts": 2, "held_out_prompts": 2, "pictures": 90}
    return CalibrationConfig(**{**given, **small, **fields})


def bench(engine: Engine) -> EngineBench:
    probe = Prompt(text=TEXTS[0], seed=3)
    return EngineBench(
        engine,
        steps=STEPS,
        probe=probe,
        arguments=CALL,
        unit="tokens",
        skipping=True,
    )


@pytest.mark.slow
def test_plans_are_calibrated_by_how_alike_their_spectrograms_are(
    engine: Engine, tmp_path: Path
) -> None:
    need("matplotlib")
    made = bench(engine)
    assert made.tables.costs == {"p": 50.0, "2p": 25.0, "4p": 13.0}
    result = calibrate(made, config(), {})
    evidence = result.calibration.evidence
    assert evidence["makes"] == "recording"
    assert evidence["measure"] == {"name": "STFT similarity", "ratio": "SNR"}
    assert result.calibration.presets["balanced"].ssim >= 0.3
    assert result.calibration.front[0].ssim == 1
    text = summary(result.calibration)
    assert "STFT similarity   SNR" in text
    assert "tokens per recording" in text
    assert write_report(result.calibration, tmp_path)[1].stat().st_size > 9000
    with pytest.raises(ValueError, match=r"min_ssim=0\.9 .*compared by STFT similarity; give min"):
        calibrate(made, config(request={"min_ssim": 0.9}), {})


def test_a_step_cache_is_fitted_and_runs(engine: Engine) -> None:
    prompts = [Prompt(text=text, seed=seed) for seed, text in enumerate(TEXTS[:2])]
    arguments = {**CALL, "num_inference_steps": STEPS}
    fit = fit_cache(engine, "magcache", prompts, arguments=arguments, conditions={})
    cache = MagCache(0.5, mag_ratios=fit.values)
    engine("aabb", **arguments, patch_policy="p", step_cache=cache, generator=seeded())
    assert engine.last_trace is not None
    assert engine.last_trace.reused > 0


def test_an_evaluation_keeps_recordings_and_plays_them(engine: Engine, tmp_path: Path) -> None:
    need("jinja2", "matplotlib")
    settings = EvaluationConfig(
        out=tmp_path,
        prompts=TEXTS[:2],
        source="a test",
        steps=STEPS,
        policies=(("half", HALF),),
        arguments=CALL,
        cost_unit="tokens",
    )
    subject = evaluation.Subject(model="tiny", artifact="tiny.ddit")
    report, (page, record) = evaluation.evaluate(engine, settings, subject, sound_metrics())
    assert json.loads(record.read_text())["makes"] == "recording"
    assert [metric["label"] for metric in report["metrics"]] == ["SNR, dB", "STFT similarity"]
    (plan,) = (plan for plan in report["plans"] if plan["name"] == "half")
    assert 0 < plan["scores"]["stft"]["value"] < 1
    (made,) = report["prompts"][0]["pictures"]["half"]
    assert made["file"].endswith(".wav")
    assert len(set(read_wav(tmp_path / made["file"])[0])) > 16  # not silence
    text = page.read_text()
    assert text.count("<audio controls") == len(report["plans"]) * 2
    assert "at STFT similarity" in text
    assert "<script" not in text
    assert "half is more similar than" in evaluation.summary(report)
    with pytest.raises(ValueError, match="people compare images"):
        Study(tmp_path)
    # What is there already is not made again.
    again, _ = evaluation.evaluate(engine, settings, subject, sound_metrics())
    assert len(again["sessions"]) == 1


def test_a_profile_counts_what_its_steps_take(engine: Engine, tmp_path: Path) -> None:
    arguments = {**CALL, "num_inference_steps": 4, "generator": seeded()}
    subject = subject_of(engine, HALF, NoCache(), TEXTS[:1], arguments)
    report = report_of(subject, ceilings(), [profiled(subject, None, tmp_path)])
    assert "latents 1 x 4 x 1 x 50" in text_of(report)
    phases = {(row["patch"], row["phase"]) for row in report["runs"][0]["rows"]}
    assert {("p", "model"), ("2p", "model")} <= phases
