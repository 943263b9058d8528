"""The demo's plans."""

import pytest

from ddit_rt.lab.demo.plans import DEMO_POLICY, static_plan
from ddit_rt.policies import DYNAMIC, Schedule


def test_static_plan_starts_and_ends_fine_and_refreshes() -> None:
    assert static_plan(12).plan == (*["p"] * 3, *["4p"] * 3, "p", *["4p"] * 3, "p", "p")


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 24, 50])
def test_plans_fit_any_number_of_steps(steps: int) -> None:
    sigmas = tuple(1 - step / steps for step in range(steps + 1))
    schedule = Schedule(sigmas=sigmas, offered=(1, 2, 4))
    assert static_plan(steps).resolve(schedule).forced[-1] == 0
    table = DEMO_POLICY.resolve(schedule)
    assert table.forced[0] == table.forced[-1] == 0
    runs = "".join("d" if bucket == DYNAMIC else "p" for bucket in table.forced).split("p")
    assert max(map(len, runs)) <= 4
