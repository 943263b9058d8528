from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


def test_spread_of_known_values() -> None:
    spread = import_module("timing").spread
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3,
        "min": 1,
        "max": 5,
        "lower_quartile": 2,
        "upper_quartile": 4,
        "count": 5,
    }
    assert set(spread([7.0]).values()) == {7.0, 1}


def test_methods_take_turns_after_their_warm_up() -> None:
    timing = import_module("timing")
    order: list[str] = []

    def build(name: str) -> Callable[[], Any]:
        return lambda: order.append(name)

    measured = timing.take_turns(
        {name: (lambda name=name: build(name)) for name in "ab"},
        repeats=3,
        device=CPU,
        deadline=timing.Deadline(60),
    )
    assert order == ["a", "a", "b", "b", *"ababab"]
    for own in measured.values():
        assert own.error is None
        assert len(own.seconds) == len(own.wall_seconds) == len(own.results) == 3
        assert own.first_call_seconds is not None


@pytest.mark.parametrize("fails_at", ["build", "first call", "third call"])
def test_failing_method_leaves_its_error_and_the_others_go_on(fails_at: str) -> None:
    timing = import_module("timing")
    calls = 0

    def bad_call() -> None:
        nonlocal calls
        calls += 1
        if fails_at == "first call" or calls == 3:
            raise torch.OutOfMemoryError("no room")

    def bad() -> Callable[[], None]:
        if fails_at == "build":
            raise RuntimeError("cannot be built")
        return bad_call

    measured = timing.take_turns(
        {"bad": bad, "good": lambda: lambda: 7},
        repeats=2,
        device=CPU,
        deadline=timing.Deadline(60),
    )
    expected = "RuntimeError: cannot" if fails_at == "build" else "OutOfMemoryError: no room"
    assert measured["bad"].error.startswith(expected)
    assert measured["bad"].provisional == (fails_at == "third call")
    assert measured["good"].results == [7, 7]


def test_method_that_takes_too_long_to_get_ready_drops_out() -> None:
    timing = import_module("timing")

    def compile_for_ever() -> Callable[[], None]:
        time.sleep(60)
        raise AssertionError("the limit did not interrupt it")

    measured = timing.take_turns(
        {"slow": compile_for_ever, "good": lambda: lambda: 7},
        repeats=1,
        device=CPU,
        deadline=timing.Deadline(60),
        warm_up_limit=1.0,
    )
    assert measured["slow"].error == "TimeoutError: not ready after 1 s"
    assert measured["good"].results == [7]


def test_what_warmed_up_stands_until_it_is_measured() -> None:
    """A command that is killed has written down what it knew."""
    timing = import_module("timing")
    told: list[dict[str, tuple[bool, int]]] = []

    def note(measured: dict[str, Any]) -> None:
        told.append({name: (own.provisional, len(own.results)) for name, own in measured.items()})

    timing.take_turns(
        {"one": lambda: lambda: 1, "two": lambda: lambda: 2},
        repeats=2,
        device=CPU,
        deadline=timing.Deadline(60),
        on_news=note,
    )
    assert told == [
        {"one": (True, 1), "two": (False, 0)},
        {"one": (True, 1), "two": (True, 1)},
        {"one": (False, 1), "two": (False, 1)},
        {"one": (False, 2), "two": (False, 2)},
    ]


def test_nothing_starts_after_the_deadline() -> None:
    timing = import_module("timing")
    measured = timing.take_turns(
        {"late": lambda: lambda: 7}, repeats=5, device=CPU, deadline=timing.Deadline(0)
    )
    assert "no time was left" in measured["late"].error
    assert measured["late"].results == []


def test_methods_get_ready_only_while_a_round_of_the_others_fits() -> None:
    timing = import_module("timing")

    class Scripted:
        answers = iter([60.0, 0.005, 60.0])

        @property
        def left(self) -> float:
            return next(self.answers)

    measured = timing.take_turns(
        # A call of the first takes at least 10 ms, so 5 ms are too few for a round of it.
        {"first": lambda: lambda: time.sleep(0.01), "second": lambda: lambda: 7},
        repeats=1,
        device=CPU,
        deadline=Scripted(),
    )
    assert "no time was left to build it" in measured["second"].error
    assert len(measured["first"].seconds) == 1


def test_rounds_end_at_the_deadline_but_one_is_run() -> None:
    timing = import_module("timing")
    deadline = timing.Deadline(60)

    def build() -> Callable[[], None]:
        calls = 0

        def call() -> None:
            nonlocal calls, deadline
            calls += 1
            if calls == 3:  # the first measured one, after two that warm up
                deadline._end = time.perf_counter() - 1

        return call

    measured = timing.take_turns({"one": build}, repeats=5, device=CPU, deadline=deadline)
    assert len(measured["one"].seconds) == 1
