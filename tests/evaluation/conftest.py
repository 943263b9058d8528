from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import prompting_pipeline

import ddit_rt
from ddit_rt import Engine
from ddit_rt.evaluation.config import EvaluationConfig
from ddit_rt.evaluation.metrics import DemoFrechetDistance, Metric, Psnr, Skipped, Ssim
from ddit_rt.evaluation.run import Subject, evaluate

HOSTILE = "<script>alert('a')</script> & \"a cat\""
PROMPTS = ("a zebra", HOSTILE, "a vase")
SKIPPED = (Skipped(name="lpips", label="LPIPS", reason="not installed: <torchvision>"),)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An eager engine whose prompts differ."""
    return ddit_rt.compile(
        prompting_pipeline(),
        height=64,
        width=64,
        patch_sizes=("p", "2p"),
        patch_policy=ddit_rt.DDiTPolicy(tau={"2p": 1.0}, refresh=2),
        backend="eager",
        progress=False,
    )


def settings(out: Path, **fields: Any) -> EvaluationConfig:
    given = {"prompts": PROMPTS, "source": "prompts.txt", "steps": 8, "cost_unit": "tokens"}
    return EvaluationConfig(out=out, **{**given, **fields})


def metrics() -> list[Metric]:
    return [Psnr(), Ssim(), DemoFrechetDistance()]


def run(engine: Engine, config: EvaluationConfig) -> dict[str, Any]:
    subject = Subject(model="tiny", artifact="tiny.ddit")
    report, _ = evaluate(engine, config, subject, metrics(), SKIPPED, shown=2, progress=False)
    return report


@pytest.fixture(scope="session")
def evaluation(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    run(engine, settings(out, seeds=2))
    return out
