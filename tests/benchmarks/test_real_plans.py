from __future__ import annotations

from importlib import import_module

import pytest

from ddit_rt.policies import Schedule

# FLUX.1-dev at 1024 x 1024, by count: TFLOP a step.
FLOPS = {"p": 74_400, "2p": 21_500, "4p": 10_300}


@pytest.mark.parametrize("speedup", [2.18, 3.52])
@pytest.mark.parametrize("steps", [28, 50])
def test_plan_takes_the_wanted_share_of_the_operations(speedup: float, steps: int) -> None:
    plans = import_module("real_loops")
    plan = plans.plan_for_speedup(speedup, FLOPS, steps)
    assert len(plan) == steps
    assert plans.counted_speedup(plan, FLOPS) == pytest.approx(speedup, rel=0.02)
    # As many steps again that reuse, and so count for nothing.
    skipping = plans.counted_speedup(plan, FLOPS, reused=steps)
    assert skipping == pytest.approx(2 * speedup, rel=0.02)
    # Even shares of 2p and 4p, as the closed form of the docstring has them, as far as whole steps
    # allow: one step at p more or less is moved back to the ratio by about five from 2p to 4p.
    share = (1 - 1 / speedup) / (2 - FLOPS["2p"] / FLOPS["p"] - FLOPS["4p"] / FLOPS["p"])
    assert plan.count("p") == pytest.approx((1 - 2 * share) * steps, abs=1)
    assert plan.count("2p") == pytest.approx(share * steps, abs=3)
    assert plan.count("4p") == pytest.approx(share * steps, abs=3)
    # Coarse steps first.
    assert plan == sorted(plan, key=["4p", "2p", "p"].index)


def test_a_size_without_4p_has_plans_without_it() -> None:
    plans, flops = import_module("real_loops"), {"p": 74_400, "2p": 21_500}
    plan = plans.plan_for_speedup(2.1, flops, 50)
    assert set(plan) == {"p", "2p"}
    assert plans.counted_speedup(plan, flops) == pytest.approx(2.1, rel=0.02)


def test_plan_that_no_shares_reach_is_refused_with_the_limit() -> None:
    plans = import_module("real_loops")
    # At 512 x 512 the 512 text tokens outweigh the image.
    flops = {"p": 21_500, "2p": 10_300, "4p": 7_700}
    with pytest.raises(ValueError, match=r"3.52x .* all steps at 4p give 2.79x"):
        plans.plan_for_speedup(3.52, flops, 28)


def test_every_schedule_is_a_policy_for_its_steps() -> None:
    plans = import_module("real_loops")
    sigmas = tuple(1 - step / 28 for step in range(29))
    models = import_module("real_models").MODELS
    for schedule in {name for model in models.values() for name in model.schedules}:
        policy = plans.policy_of(schedule, FLOPS, 28)
        table = policy.resolve(Schedule(sigmas=sigmas, offered=(1, 2, 4)))
        assert table.steps == 28
    schedules = ("fine", "paper_2.18x", "paper_3.52x", "dynamic")
    assert models["flux"].schedules == schedules
