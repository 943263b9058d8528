from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddit_rt import checks


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_takes_every_kind_of_whole_number(value: Any) -> None:
    taken = checks.whole("steps", value, 1, 3)
    assert (type(taken), taken) == (int, 3)


@pytest.mark.parametrize(
    "value", [3, 3.0, np.float32(3), np.int8(3), np.array(3.0), torch.tensor(3.0).bfloat16()]
)
def test_number_takes_every_kind_of_number(value: Any) -> None:
    taken = checks.number("tau", value)
    assert (type(taken), taken) == (float, 3.0)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)])
def test_truth_values_are_flags_and_no_numbers(value: Any) -> None:
    assert checks.flag("progress", value) is True
    for check in (checks.whole, checks.number):
        with pytest.raises(TypeError, match="got steps=.*rue"):
            check("steps", value)


@pytest.mark.parametrize("value", [0, 1, 1.0, "yes", None, [], torch.ones(1, dtype=torch.bool)])
def test_flag_goes_by_no_truth_value(value: Any) -> None:
    with pytest.raises(TypeError, match="got trust_code=.*; expected True or False"):
        checks.flag("trust_code", value)


@pytest.mark.parametrize(
    "value", [3.5, "3", None, [3], b"3", 3j, {}, torch.tensor([3]), np.array([3]), object(), int]
)
def test_whole_refuses_other_types(value: Any) -> None:
    with pytest.raises(TypeError, match="got steps=.*; expected a whole number of at least 1"):
        checks.whole("steps", value, 1)


def test_whole_says_which_whole_number_a_float_is() -> None:
    with pytest.raises(TypeError, match=r"got height=64\.0; expected a whole number: pass 64"):
        checks.whole("height", 64.0)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [((1, None), "of at least 1"), ((None, 3), "of at most 3"), ((1, 3), "1 to")],
)
def test_whole_says_its_bounds(bounds: tuple[int | None, int | None], said: str) -> None:
    bad = 0 if bounds[0] is not None else 4
    with pytest.raises(ValueError, match=said):
        checks.whole("steps", bad, *bounds)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, 1e39, -0.1, 1.5])
def test_number_refuses_what_float32_cannot_hold_and_what_is_out_of_bounds(value: float) -> None:
    with pytest.raises(ValueError, match=r"got rho=.*; expected a finite number from 0 to 1"):
        checks.number("rho", value, 0, 1)


def test_number_may_leave_its_lower_bound_out() -> None:
    assert checks.number("lr", 0, 0) == 0
    with pytest.raises(ValueError, match="got lr=0; expected a finite number above 0"):
        checks.number("lr", 0, 0, open_low=True)


@pytest.mark.parametrize("value", [(1, 2.5), [1, 2.5], np.array([1, 2.5]), torch.tensor([1, 2.5])])
def test_numbers_takes_every_kind_of_sequence(value: Any) -> None:
    assert checks.numbers("sigmas", value) == (1.0, 2.5)


@pytest.mark.parametrize("value", ["12", b"12", {1: 2}, {1}, 3, None, np.ones((1, 1)), iter([1])])
def test_numbers_refuses_what_is_no_sequence(value: Any) -> None:
    with pytest.raises(TypeError, match="got sigmas=.*; expected a sequence of numbers"):
        checks.numbers("sigmas", value)


def test_numbers_names_the_place_of_a_bad_one() -> None:
    with pytest.raises(ValueError, match=r"got sigmas\[1\]=nan"):
        checks.numbers("sigmas", [1, math.nan])
    with pytest.raises(ValueError, match=r"got sigmas=\[\]; expected at least 1 number"):
        checks.numbers("sigmas", [])


def test_choice_says_what_was_meant() -> None:
    assert checks.choice("backend", "aot", ("aot", "eager")) == "aot"
    with pytest.raises(ValueError, match="one of 'aot', 'eager': did you mean 'eager'"):
        checks.choice("backend", "eagre", ("aot", "eager"))
    with pytest.raises(TypeError, match="got backend=None"):
        checks.choice("backend", None, ("aot", "eager"))


@pytest.mark.parametrize(
    ("value", "error"),
    [(None, TypeError), (b"a", TypeError), ("", ValueError), ("a\0", ValueError)],
)
def test_path_refuses_what_is_none(value: Any, error: type[Exception]) -> None:
    assert checks.path("path", "a") == checks.path("path", Path("a")) == Path("a")
    with pytest.raises(error, match="got path="):
        checks.path("path", value)


def test_class_in_place_of_its_object_is_told() -> None:
    with pytest.raises(TypeError, match="expected a list: call the class"):
        checks.instance("items", list, list, "a list")


def test_message_shows_a_tensor_by_its_shape_and_cuts_a_long_value() -> None:
    assert checks.show(torch.zeros(2, 3)) == "<Tensor of shape [2, 3], torch.float32>"
    assert checks.show(np.zeros(4)) == "<ndarray of shape [4], float64>"
    assert len(checks.show("x" * 1000)) == 80


def test_unknown_names_come_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\['heigth'\]; it takes \['height'\]: did you mean 'hei"):
        checks.refuse_unknown({"heigth": 1}, ["height"], "it")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "no such file: "),
        (lambda path: path.mkdir(), OSError, "cannot read .*: Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe"), ValueError, "is no UTF-8 text"),
    ],
)
def test_text_lines_names_a_file_that_it_cannot_read(
    tmp_path: Path, make: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    path = tmp_path / "prompts.txt"
    make(path)
    with pytest.raises(error, match=message):
        checks.text_lines(path)


def test_text_lines_leaves_blank_ones_out(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n\n  b \n")
    assert checks.text_lines(tmp_path / "prompts.txt") == ["a", "b"]
