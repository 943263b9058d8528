from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tests import the scripts as they import each other, and the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def train_demo(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs the script with `--quick` and these arguments; its files lie under `tmp_path`."""
    threads = torch.get_num_threads()
    main = import_module("train_demo").main
    yield lambda *arguments: main([*arguments, "--quick", "--work", str(tmp_path)])
    torch.set_num_threads(threads)
