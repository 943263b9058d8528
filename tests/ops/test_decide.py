from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ddit_rt import _runtime
from ddit_rt.ops import Reason, decide_

TAU = 0.5  # threshold of both coarse sizes, unless a test says otherwise
LOW, HIGH = 0.1, 0.9


def fresh_state() -> Tensor:
    return torch.tensor([-1, 0, 0, 0], dtype=torch.int32)


@dataclass
class Policy:
    """A patch scheduler of `steps` steps and two coarse sizes, stepped by hand."""

    steps: int = 8
    forced: list[int] = field(default_factory=list)
    thresholds: tuple[float, float] = (TAU, TAU)
    dwell: int = 0
    monotone: bool = False

    def __post_init__(self) -> None:
        entries = self.forced + [-1] * (self.steps - len(self.forced))
        self.table = torch.tensor(entries, dtype=torch.int32)
        self.limits = torch.tensor(self.thresholds).repeat(self.steps, 1)
        self.state = fresh_state()
        self.record = torch.full((self.steps, 5), math.nan)
        self.step = 0

    def take(self, *scores: tuple[float, float]) -> tuple[int, Reason]:
        """Takes a step with the given scores, one pair per sample."""
        tensor = torch.tensor(scores) if scores else torch.empty(1, 0)
        decide_(
            tensor, self.table, self.limits, self.state, self.record,
            self.step, self.dwell, self.monotone,
        )  # fmt: skip
        row = self.record[self.step]
        assert row[0] == self.state[0]
        assert row[2] == self.state[1]
        self.step += 1
        return int(row[0]), Reason(int(row[1]))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((HIGH, HIGH), (0, Reason.ABOVE)),
        ((LOW, HIGH), (1, Reason.BELOW)),
        ((LOW, LOW), (2, Reason.BELOW)),
        ((HIGH, LOW), (2, Reason.BELOW)),  # the largest size below its threshold, as published
        ((TAU, TAU), (0, Reason.ABOVE)),  # below means strictly below
    ],
)
def test_largest_size_below_its_threshold_else_base(
    scores: tuple[float, float], expected: tuple[int, Reason]
) -> None:
    assert Policy().take(scores) == expected


def test_batch_takes_the_finest_size_that_a_sample_needs() -> None:
    assert Policy().take((LOW, LOW), (LOW, HIGH)) == (1, Reason.BELOW)
    assert Policy().take((LOW, HIGH), (HIGH, LOW)) == (1, Reason.BELOW)
    assert Policy().take((LOW, LOW), (HIGH, HIGH), (LOW, LOW)) == (0, Reason.ABOVE)


def test_each_size_and_step_has_its_own_threshold() -> None:
    policy = Policy(thresholds=(0.2, 0.05))
    assert policy.take((LOW, LOW)) == (1, Reason.BELOW)
    policy.limits[1] = torch.tensor([0.01, 0.2])
    assert policy.take((LOW, LOW)) == (2, Reason.BELOW)


def test_nan_threshold_takes_a_size_off_the_menu() -> None:
    assert Policy(thresholds=(TAU, math.nan)).take((LOW, LOW)) == (1, Reason.BELOW)
    assert Policy(thresholds=(math.nan, math.nan)).take((LOW, LOW)) == (0, Reason.ABOVE)


def test_forced_steps_ignore_scores_and_record_nan() -> None:
    policy = Policy(forced=[0, 2, 1])
    assert policy.take() == (0, Reason.FORCED)
    assert policy.take((math.nan, math.nan)) == (2, Reason.FORCED)
    assert policy.take((HIGH, HIGH)) == (1, Reason.FORCED)
    assert policy.record[:3, 3:].isnan().all()
    assert policy.state.tolist() == [1, 1, 0, 1]


def test_forced_step_overrides_dwell_and_monotone() -> None:
    policy = Policy(forced=[0, 2, 0], dwell=5, monotone=True)
    assert [policy.take()[0] for _ in range(3)] == [0, 2, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_nonfinite_score_chooses_base_and_raises_the_flag_for_good(bad: float, where: int) -> None:
    policy = Policy(dwell=4)
    assert policy.take((LOW, LOW), (LOW, LOW)) == (2, Reason.BELOW)
    scores = [LOW] * 4
    scores[where] = bad
    assert policy.take(tuple(scores[:2]), tuple(scores[2:])) == (0, Reason.NONFINITE)  # type: ignore[arg-type]
    assert policy.state.tolist() == [0, 1, 1, 0]
    policy.take((LOW, LOW))
    assert policy.state[2] == 1


def test_monotone_never_gets_coarser() -> None:
    policy = Policy(monotone=True)
    assert policy.take((LOW, LOW)) == (2, Reason.BELOW)
    assert policy.take((LOW, HIGH)) == (1, Reason.BELOW)
    assert policy.take((LOW, LOW)) == (1, Reason.MONOTONE)
    assert policy.take((HIGH, HIGH)) == (0, Reason.ABOVE)
    assert policy.take((LOW, LOW)) == (0, Reason.MONOTONE)


def test_dwell_keeps_a_bucket_for_its_least_run() -> None:
    policy = Policy(dwell=3)
    assert policy.take((HIGH, HIGH)) == (0, Reason.ABOVE)
    assert policy.take((LOW, LOW)) == (0, Reason.DWELL)
    assert policy.take((LOW, LOW)) == (0, Reason.DWELL)
    assert policy.take((LOW, LOW)) == (2, Reason.BELOW)
    assert policy.take((HIGH, HIGH)) == (2, Reason.DWELL)
    assert policy.record[:5, 2].tolist() == [1, 2, 3, 1, 2]


def test_dwell_says_nothing_when_the_bucket_would_stay_anyway() -> None:
    policy = Policy(dwell=3)
    assert policy.take((LOW, HIGH)) == (1, Reason.BELOW)
    assert policy.take((LOW, HIGH)) == (1, Reason.BELOW)


def test_monotone_comes_before_dwell() -> None:
    policy = Policy(dwell=3, monotone=True)
    assert policy.take((LOW, HIGH)) == (1, Reason.BELOW)
    assert policy.take((LOW, LOW)) == (1, Reason.MONOTONE)
    assert policy.take((HIGH, HIGH)) == (1, Reason.DWELL)
    assert policy.take((HIGH, HIGH)) == (0, Reason.ABOVE)


def test_first_step_knows_neither_dwell_nor_monotone() -> None:
    assert Policy(dwell=9, monotone=True).take((LOW, LOW)) == (2, Reason.BELOW)


def test_record_keeps_the_worst_score_of_the_batch() -> None:
    policy = Policy()
    policy.take((0.1, 0.4), (0.3, 0.2))
    assert policy.record[0, 3:].tolist() == pytest.approx([0.3, 0.4])
    policy.take((0.1, 0.4), (math.nan, 0.2))
    assert policy.record[1, 3].isnan()
    assert policy.record[2:].isnan().all()


def test_no_coarse_sizes_leave_only_the_base() -> None:
    state, record = fresh_state(), torch.zeros(2, 3)
    table = torch.full((2,), -1, dtype=torch.int32)
    decide_(torch.empty(1, 0), table, torch.empty(2, 0), state, record, 1, 0, False)
    assert record[1].tolist() == [0, Reason.ABOVE, 1]


def test_reason_codes_are_those_of_the_kernels() -> None:
    assert {reason.name: reason.value for reason in Reason} == _runtime.reason_codes()


def test_dynamic_step_without_scores_is_refused() -> None:
    with pytest.raises(RuntimeError, match="step 0 is dynamic but no scores were given"):
        Policy().take()


def test_forced_bucket_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"forced\[0\] is 3, expected -1 .* 0 to 2"):
        Policy(forced=[3]).take((LOW, LOW))


def test_refuses_shapes_dtypes_and_ranges() -> None:
    table, limits = torch.full((4,), -1, dtype=torch.int32), torch.zeros(4, 2)
    state, record, scores = fresh_state(), torch.zeros(4, 5), torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match="scores has shape"):
        decide_(torch.zeros(1, 3), table, limits, state, record, 0, 0, False)
    with pytest.raises(RuntimeError, match=r"record.*contiguous|an argument of shape"):
        decide_(scores, table, limits, state, record[:, :4], 0, 0, False)
    with pytest.raises(RuntimeError, match="forced has shape"):
        decide_(scores, table[:3], limits, state, record, 0, 0, False)
    with pytest.raises(RuntimeError, match="forced or state is Long, expected Int"):
        decide_(scores, table, limits, state.long(), record, 0, 0, False)
    with pytest.raises(RuntimeError, match="step 4"):
        decide_(scores, table, limits, state, record, 4, 0, False)
    with pytest.raises(RuntimeError, match="dwell -1"):
        decide_(scores, table, limits, state, record, 0, -1, False)
