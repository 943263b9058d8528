from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tests import the scripts as they import each other, and the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def train_demo(tmp_path: Path) -> Callable[..., None]:
    """Runs the script with `--quick` and these arguments; its files lie under `tmp_path`."""

    def run(*arguments: str) -> None:
        script = ROOT / "scripts" / "train_demo.py"
        done = subprocess.run(
            [sys.executable, script, *arguments, "--quick", "--work", tmp_path],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr

    return run
