from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from extras import need

from ddit_rt.lab.measure.fidelity import fidelity

GREY = np.full((32, 32, 3), 100, dtype=np.uint8)
NOISE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def test_constant_offset_has_the_closed_form_psnr() -> None:
    need("torchmetrics")
    result = fidelity([GREY + 10, NOISE], [GREY, NOISE])
    expected = 20 * math.log10(255 / 10)
    assert result.psnr[0] == pytest.approx(expected, abs=1e-3)
    # The equal image does not enter the mean: its ratio is infinite.
    assert result.psnr[1] is None
    assert result.mean_psnr == pytest.approx(expected, abs=1e-3)
    assert fidelity([NOISE], [NOISE]).mean_psnr is None


def test_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(ModuleNotFoundError, match=r"ddit_rt\[eval\]"):
        fidelity([GREY], [GREY])
