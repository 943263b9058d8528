from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random inputs in every run, in any order of the tests."""
    torch.manual_seed(0)
