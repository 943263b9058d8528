from __future__ import annotations

import pytest
from models import eager, tiny_pipeline

from ddit_rt import Engine


@pytest.fixture
def engine() -> Engine:
    """Uncompiled, with an artifact of its own that a calibration can be put into."""
    return eager(tiny_pipeline(), height=64, width=64)
