"""What reused steps add: the latest residual, or the line through the latest two."""

from __future__ import annotations

import pytest
import torch
from models import noise
from torch import Tensor

from ddit_rt.steps.residual import Residual

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.1])
BASE, SLOPE = noise(2, 3, 4), noise(2, 3, 4, seed=1)


def at(step: int) -> Tensor:
    return torch.tensor([step], dtype=torch.int32)


def line(step: int) -> Tensor:
    """A residual that is linear in the noise level."""
    return BASE + SLOPE * SIGMAS[step]


def computed(residual: Residual, step: int, value: Tensor | None = None, rows: int = 2) -> None:
    before = noise(2, 3, 4, seed=step + 5)[:rows]
    residual.keep(before, before + (line(step) if value is None else value)[:rows], at(step))


def added(residual: Residual, step: int, rows: int = 2) -> Tensor:
    before = noise(2, 3, 4, seed=step + 50)[:rows]
    return residual.added_to(before, at(step)) - before


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # Differences of numbers of order 1, three to four roundings of them.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def test_two_extrapolate_a_line_exactly_however_the_levels_are_spaced() -> None:
    residual = Residual(2, SIGMAS)
    computed(residual, 0)
    computed(residual, 1)
    for step in (2, 3):
        assert_close(added(residual, step), line(step))
    computed(residual, 4)
    assert_close(added(residual, 5), line(5))


def test_one_is_added_as_it_is() -> None:
    residual = Residual(1, SIGMAS)
    computed(residual, 0)
    computed(residual, 1)
    assert_close(added(residual, 3), line(1))
    assert residual.tensors() == ()


def test_a_stretch_begins_with_plain_reuse() -> None:
    residual = Residual(2, SIGMAS)
    computed(residual, 0)
    assert_close(added(residual, 1), line(0))
    computed(residual, 3)  # step 2 went elsewhere
    assert_close(added(residual, 4), line(3))
    computed(residual, 5)
    assert_close(added(residual, 5), line(5))


def test_another_number_of_samples_begins_a_stretch() -> None:
    """Steps without guidance run a part of them; what the others left is of an older step."""
    residual = Residual(2, SIGMAS, rows=2)
    computed(residual, 0)
    computed(residual, 1, rows=1)
    assert_close(added(residual, 2, rows=1), line(1)[:1])
    computed(residual, 3)
    assert_close(added(residual, 4), line(3))


def test_a_level_that_is_visited_twice_gives_no_slope() -> None:
    residual = Residual(2, torch.tensor([1.0, 0.5, 0.5, 0.2]))
    for step in (1, 2):
        computed(residual, step, BASE * step)
    assert_close(added(residual, 3), BASE * 2)


def test_what_an_older_run_left_is_not_read() -> None:
    """Not even by a factor of 0, which would let a NaN through."""
    residual = Residual(2, SIGMAS)
    computed(residual, 0, torch.full((2, 3, 4), float("nan")))
    computed(residual, 1, torch.full((2, 3, 4), float("nan")))
    for tensor, fresh in zip(residual.tensors(), Residual(2, SIGMAS).tensors(), strict=True):
        tensor.copy_(fresh)  # as a captured run is given another
    computed(residual, 2)
    assert_close(added(residual, 3), line(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_stays(dtype: torch.dtype) -> None:
    residual = Residual(2, SIGMAS)
    for step in (0, 1):
        before = noise(2, 3, 4).to(dtype)
        residual.keep(before, before + line(step).to(dtype), at(step))
    after = residual.added_to(noise(2, 3, 4).to(dtype), at(2))
    assert after.dtype == dtype
    # Numbers of order 4 with 8 bits, twice the difference of two of them.
    torch.testing.assert_close(after.float(), noise(2, 3, 4) + line(2), rtol=0, atol=0.1)


def test_reading_before_writing_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="reuses what an earlier one"):
        Residual(2, SIGMAS).added_to(BASE, at(1))
