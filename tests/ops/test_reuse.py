from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ddit_rt import _runtime
from ddit_rt.ops import CacheGrowth, CacheReason, decide_reuse_

BUCKETS = 3
NONE = math.nan  # an increment that says: compute


@dataclass
class Cache:
    """A step cache stepped by hand, at sizes that the test names."""

    increments: list[float]
    threshold: float = 1.0
    coefficients: list[float] = field(default_factory=list)
    limit: int = 99
    growth: CacheGrowth = CacheGrowth.SUM
    batch: int = 1

    def __post_init__(self) -> None:
        self.table = torch.tensor(self.increments)
        self.terms = torch.tensor(self.coefficients)
        self.state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
        self.memory = torch.full((2 + self.batch,), 17.0)  # what another run has left
        self.record = torch.zeros(len(self.increments), 2)
        self.step = 0

    def take(self, *signal: float, bucket: int = 0) -> CacheReason:
        """A step at a size, with a signal per sample."""
        run = int(self.state[1]) + 1 if int(self.state[0]) == bucket else 1
        self.state.copy_(torch.tensor([bucket, run, int(self.state[2]), bucket]))
        decide_reuse_(
            torch.tensor(signal), self.table, self.terms, self.state, self.memory, self.record,
            self.step, BUCKETS, self.threshold, self.limit, self.growth,
        )  # fmt: skip
        reason = CacheReason(int(self.record[self.step, 0]))
        reused = reason == CacheReason.REUSED
        assert int(self.state[3]) == bucket + (BUCKETS if reused else 0)
        assert self.state[:2].tolist() == [bucket, run]
        self.step += 1
        return reason

    @property
    def sums(self) -> list[float]:
        return self.record[: self.step, 1].tolist()


def test_reuses_while_the_sum_is_below_the_threshold() -> None:
    cache = Cache([NONE, 0.5, 0.25, 0.25, 0.5, NONE])
    met = [cache.take().name for _ in range(6)]
    assert met == ["FORCED", "REUSED", "REUSED", "ABOVE", "REUSED", "FORCED"]
    expected = [math.nan, 0.5, 0.75, 1.0, 0.5, math.nan]
    assert cache.sums == pytest.approx(expected, abs=0, nan_ok=True)


def test_a_change_of_size_computes_and_starts_anew() -> None:
    cache = Cache([NONE] + [0.3] * 7)
    sizes = [0, 0, 2, 2, 0, 0, 0, 0]
    met = [cache.take(bucket=size).name for size in sizes]
    assert met == [
        *("FORCED", "REUSED", "CHANGED", "REUSED", "CHANGED", "REUSED", "REUSED", "REUSED")
    ]
    assert cache.sums[5:] == pytest.approx([0.3, 0.6, 0.9], rel=1e-6)


def test_a_polynomial_of_the_signal_is_added() -> None:
    cache = Cache([NONE, 0, 0], coefficients=[2.0, -1.0, 0.25])
    assert cache.take() == CacheReason.FORCED
    assert cache.take(0.5) == CacheReason.REUSED
    assert cache.sums[1] == 2 * 0.25 - 0.5 + 0.25
    assert cache.take(1.0) == CacheReason.ABOVE
    assert cache.sums[2] == 0.25 + 1.25


def test_a_sum_may_fall() -> None:
    """The published polynomials are negative in places, and TeaCache adds them as they are."""
    cache = Cache([NONE, 0.9, -0.5, 0.5, 0.2])
    met = [cache.take().name for _ in range(5)]
    assert met == ["FORCED", "REUSED", "REUSED", "REUSED", "ABOVE"]


def test_every_sample_of_a_batch_has_a_sum_and_a_say() -> None:
    """Neither the mean change nor the sum of the largest ones: each sample's own cache."""
    cache = Cache([NONE, 0, 0, 0], coefficients=[1.0, 0.0], batch=2)
    cache.take()
    assert cache.take(0.9, 0.1) == CacheReason.REUSED
    assert cache.take(0.05, 0.8) == CacheReason.REUSED  # 0.95 and 0.9; the largest sum to 1.7
    assert cache.take(0.0, 0.2) == CacheReason.ABOVE  # 0.95 and 1.1; the mean is 1.025
    assert cache.sums[1:] == pytest.approx([0.9, 0.95, 1.1])


def test_product_adds_the_error_of_the_ratios_so_far() -> None:
    ratios = [NONE, 0.9, 0.9, 1.1, 0.95]
    cache = Cache(ratios, threshold=0.3, growth=CacheGrowth.PRODUCT)
    assert cache.take() == CacheReason.FORCED
    assert cache.take() == CacheReason.REUSED  # 0.1
    assert cache.take() == CacheReason.REUSED  # 0.1 + 0.19
    assert cache.take() == CacheReason.ABOVE  # + |1 - 0.891|
    assert cache.take() == CacheReason.REUSED
    expected = [0.1, 0.29, 0.399, 0.05]
    assert cache.sums[1:] == pytest.approx(expected, rel=1e-5)


def test_a_change_since_the_latest_computed_step_is_not_added_up() -> None:
    cache = Cache(
        [NONE] + [0.0] * 4,
        threshold=0.3,
        coefficients=[1.0, 0.0],
        batch=2,
        growth=CacheGrowth.LATEST,
    )
    assert cache.take(9.0, 9.0) == CacheReason.FORCED
    assert cache.take(0.2, 0.1) == CacheReason.REUSED
    assert cache.take(0.1, 0.2) == CacheReason.REUSED  # the sums would be 0.3
    assert cache.take(0.1, 0.4) == CacheReason.ABOVE
    assert cache.take(0.2, 0.2) == CacheReason.REUSED
    assert cache.sums[1:] == pytest.approx([0.2, 0.2, 0.4, 0.2])


def test_limit_ends_a_row_of_reused_steps() -> None:
    cache = Cache([NONE] + [0.0] * 6, limit=2)
    met = [cache.take().name for _ in range(7)]
    assert met == ["FORCED", "REUSED", "REUSED", "LIMIT", "REUSED", "REUSED", "LIMIT"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_signal_that_is_not_finite_computes_and_raises_the_flag(bad: float, place: int) -> None:
    cache = Cache([NONE, 0, 0, 0], coefficients=[1.0, 0.0], batch=2)
    cache.take()
    signal = [0.1, 0.1]
    signal[place] = bad
    assert cache.take(*signal) == CacheReason.NONFINITE
    assert int(cache.state[2]) == 1
    assert cache.take(0.0, 0.0) == CacheReason.NONFINITE, "for good"


def test_a_forced_step_looks_at_no_signal() -> None:
    cache = Cache([NONE], coefficients=[1.0, 0.0])
    assert cache.take(math.nan) == CacheReason.FORCED
    assert int(cache.state[2]) == 0


def test_threshold_zero_reuses_nothing() -> None:
    cache = Cache([NONE, 0.0, 0.0], threshold=0.0)
    assert [cache.take().name for _ in range(3)] == ["FORCED", "ABOVE", "ABOVE"]


def test_reason_codes_are_those_of_the_kernels() -> None:
    codes = {reason.name: reason.value for reason in CacheReason}
    assert codes == _runtime.cache_reason_codes()


def arguments() -> dict[str, Tensor]:
    return {
        "signal": torch.zeros(2),
        "increments": torch.zeros(4),
        "coefficients": torch.zeros(3),
        "state": torch.tensor([0, 2, 0, 0], dtype=torch.int32),
        "memory": torch.zeros(4),
        "record": torch.zeros(4, 2),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": torch.zeros(2)}, "memory has 2 words"),
        ({"signal": torch.zeros(3)}, "signal has shape"),
        ({"signal": torch.zeros(0)}, "signal has shape"),  # and a polynomial of it
        ({"record": torch.zeros(4, 3)}, "record has shape"),
        ({"coefficients": torch.zeros(8)}, "8 terms, expected at most 7"),
        ({"state": torch.zeros(3, dtype=torch.int32)}, "state has shape"),
        ({"increments": torch.zeros(4, dtype=torch.float64)}, "is Double, expected Float"),
        ({"step": 4}, "step 4"),
        ({"buckets": 0}, "buckets 0"),
        ({"limit": -1}, "limit -1"),
        ({"growth": 3}, "growth 3"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    numbers = {"step": 0, "buckets": 3, "limit": 9, "growth": 0}
    with pytest.raises(RuntimeError, match=message):
        decide_reuse_(**{**arguments(), **numbers, **changes}, threshold=1.0)
