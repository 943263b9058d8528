from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from extras import need

import ddit_rt
from ddit_rt import Engine
from ddit_rt.lab.demo.plans import Plan
from ddit_rt.lab.demo.run import DemoConfig, compare

# Last, because `profile.py` there would hide the standard library's.
sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts"))

PROMPTS = ("a red circle on plain blue", "a black star on blue dots")


@pytest.fixture(scope="session")
def plans() -> tuple[Plan, ...]:
    return (
        Plan(name="fine", label="full resolution", policy=ddit_rt.FinePolicy()),
        Plan(name="static", label="static plan", policy=ddit_rt.StaticPolicy("2p:0.5,p")),
        Plan(name="dynamic", label="dynamic", policy=ddit_rt.DDiTPolicy(tau={"2p": 1.0})),
    )


@pytest.fixture(scope="session")
def demo_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def report(engine: Engine, plans: tuple[Plan, ...], demo_out: Path) -> dict[str, Any]:
    """The report of a tiny demo run, whose files are in `demo_out`."""
    need("matplotlib", "torchmetrics")
    config = DemoConfig(out=demo_out, prompts=PROMPTS, steps=8, height=32, width=32, repeats=2)
    compiling = {"compile_seconds": 1.0, "load_seconds": 0.5, "artifact_bytes": 10}
    return compare(engine, plans, config, compiling)
