from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from extras import need
from models import tiny_embeds, tiny_pipeline

import ddit_rt
from ddit_rt import Engine
from ddit_rt.lab.demo.plans import Plan
from ddit_rt.lab.demo.run import DemoConfig, compare

PROMPTS = ("a red circle on plain blue", "a black star on blue dots")


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An eager engine of a tiny pipeline that takes every prompt for the same one."""
    pipeline, one = tiny_pipeline(), tiny_embeds()

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[torch.Tensor, ...]:
        embeds = {name: value.repeat_interleave(len(prompt), 0) for name, value in one.items()}
        return embeds["prompt_embeds"], embeds["pooled_prompt_embeds"], torch.zeros(7, 3)

    pipeline.encode_prompt = encode_prompt
    return ddit_rt.compile(
        pipeline,
        height=32,
        width=32,
        patch_sizes=("p", "2p"),
        backend="eager",
        progress=False,
    )


@pytest.fixture(scope="session")
def plans() -> tuple[Plan, ...]:
    return (
        Plan(name="fine", label="all fine", policy=ddit_rt.FinePolicy()),
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
    config = DemoConfig(out=demo_out, steps=8, height=32, width=32, repeats=2)
    compiling = {"compile_seconds": 1.0, "load_seconds": 0.5, "artifact_bytes": 10}
    return compare(engine, PROMPTS, plans, config, compiling)
