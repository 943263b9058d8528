"""The emulated device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from emulated_graphs import EmulatedGraphs


@pytest.fixture
def graphs(emulated_runtime: Any) -> Iterator[EmulatedGraphs]:
    gc.collect()  # so that no loop of an earlier test ends within this one
    emulated_runtime.reset()
    yield EmulatedGraphs(emulated_runtime)
    assert emulated_runtime.violation() == ""
