from __future__ import annotations

from pathlib import Path

import pytest
from evaluations import run, settings
from extras import need
from models import prompting_pipeline

import ddit_rt
from ddit_rt import Engine


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


@pytest.fixture(scope="session")
def evaluation(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation; tests that change it copy it first."""
    need("torchmetrics")
    out = tmp_path_factory.mktemp("evaluation") / "out"
    run(engine, settings(out, seeds=2))
    return out
