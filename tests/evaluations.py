"""Evaluations of a tiny engine, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddit_rt import Engine
from ddit_rt.lab.evaluate.config import EvaluationConfig
from ddit_rt.lab.evaluate.metrics import DemoFrechetDistance, Metric, Psnr, Skipped, Ssim
from ddit_rt.lab.evaluate.run import Subject, evaluate

HOSTILE = "<script>alert('a')</script> & \"a cat\""
PROMPTS = ("a zebra", HOSTILE, "a vase")
SKIPPED = (Skipped(name="lpips", label="LPIPS", reason="not installed: <torchvision>"),)


def settings(out: Path, **fields: Any) -> EvaluationConfig:
    given = {"prompts": PROMPTS, "source": "prompts.txt", "steps": 8, "cost_unit": "tokens"}
    return EvaluationConfig(out=out, **{**given, **fields})


def metrics() -> list[Metric]:
    return [Psnr(), Ssim(), DemoFrechetDistance()]


def run(engine: Engine, config: EvaluationConfig) -> dict[str, Any]:
    subject = Subject(model="tiny", artifact="tiny.ddit")
    report, _ = evaluate(engine, config, subject, metrics(), SKIPPED, shown=2)
    return report
