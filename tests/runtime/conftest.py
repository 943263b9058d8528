from __future__ import annotations

import gc
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random inputs in every run, in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def runtime(emulated_runtime: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The emulated runtime; afterwards, no rule of CUDA is broken and nothing is left over."""
    emulated_runtime.reset()
    before = emulated_runtime.live_objects()
    failed = request.session.testsfailed
    yield emulated_runtime
    violation = emulated_runtime.violation()
    emulated_runtime.reset()
    if request.session.testsfailed > failed:
        return  # the report of the failure keeps objects alive
    assert violation == ""
    if emulated_runtime.live_objects() != before:
        gc.collect()
    after = emulated_runtime.live_objects()
    assert {kind for kind in after if after[kind] > before[kind]} == set()
