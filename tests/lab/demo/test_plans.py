"""The demo's plans."""

import pytest

from ddit_rt.lab.demo.plans import DEMO_POLICY, demo_calibration, static_plan
from ddit_rt.policies import DYNAMIC, PatchPolicy, Schedule, policy_from_dict


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


def test_the_packages_calibration_goes_from_full_resolution_to_its_fastest_plan() -> None:
    calibration = demo_calibration()
    assert (calibration.num_inference_steps, calibration.cost_unit) == (24, "tokens")
    slowest, fastest = calibration.plan(0.0), calibration.plan(1.0)
    assert (slowest.kind, slowest.speedup, slowest.ssim) == ("fine", 1, 1)
    assert fastest.speedup == max(plan.speedup for plan in calibration.plans)
    for plan in calibration.plans:
        assert isinstance(policy_from_dict(plan.policy), PatchPolicy)
