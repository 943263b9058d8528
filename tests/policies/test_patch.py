"""Policies against tables worked out by hand."""

import json
import math

import pytest

from ddit_rt.errors import ShapeError
from ddit_rt.policies import (
    DYNAMIC,
    DDiTPolicy,
    FinePolicy,
    PatchPolicy,
    Schedule,
    SpectralPolicy,
    StaticPolicy,
    policy_from_dict,
)


def uniform(steps: int, offered: tuple[int, ...] = (1, 2, 4)) -> Schedule:
    sigmas = (*(1 - step / steps for step in range(steps)), 0.0)
    return Schedule(sigmas=sigmas, offered=offered)


def test_fine_policy_forces_the_base_patch() -> None:
    table = FinePolicy().resolve(uniform(5))
    assert table.forced == (0,) * 5
    assert table.reachable() == {0}
    assert not table.coarse_after_fine()


def test_static_shares_round_cumulatively() -> None:
    table = StaticPolicy("4p:0.2,2p:0.4,p").resolve(uniform(28))
    # 0.2 * 28 = 5.6 -> 6; 0.6 * 28 = 16.8 -> 17
    assert table.forced == (2,) * 6 + (1,) * 11 + (0,) * 11


def test_static_list_takes_names_and_multiples() -> None:
    table = StaticPolicy(["4p", 2, "p"]).resolve(uniform(3))
    assert table.forced == (2, 1, 0)


def test_static_plan_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 entries and the run 4 steps"):
        StaticPolicy(["4p", "2p", "p"]).resolve(uniform(4))


def test_static_plan_with_unoffered_size_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"asks for 4p.*\['p', '2p'\]"):
        StaticPolicy("4p:0.5,p").resolve(uniform(4, offered=(1, 2)))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("2p:0.7,4p:0.6", "add up to 1.3"),
        ("2p:0.5,p:0.4", "add up to 0.9"),
        ("2p,p", "only its last"),
        ("3p:1.0", "powers of two"),
        ("big:0.5,p", "cannot read 'big:0.5'"),
        ("2p:x,p", "cannot read '2p:x'"),
        ("2p:-0.5,p", "shares >= 0"),
        ("", "cannot read"),
    ],
)
def test_static_plan_that_cannot_be_read_says_why(plan: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticPolicy(plan)


def test_ddit_defaults_start_and_end_fine_and_refresh() -> None:
    table = DDiTPolicy().resolve(uniform(12))
    assert DDiTPolicy() == DDiTPolicy(criterion="normalised")
    dynamic = (DYNAMIC,)
    assert table.forced == (0, 0, 0, *dynamic * 4, 0, *dynamic * 2, 0, 0)
    assert table.labels == (
        *["warm-up"] * 3,
        *[""] * 4,
        "refresh",
        *[""] * 2,
        *["fine tail"] * 2,
    )
    assert table.thresholds[3] == pytest.approx((1e-3 * (50 / 12) ** 1.4,) * 2)
    assert (table.order, table.quantile, table.dwell, table.monotone) == (3, 0.4, 0, False)


def test_ddit_coarse_warm_up_takes_the_coarsest_size() -> None:
    assert DDiTPolicy(warmup="coarse").resolve(uniform(8)).forced[:4] == (2, 2, 2, DYNAMIC)
    assert DDiTPolicy(warmup="2p").resolve(uniform(8)).forced[:4] == (1, 1, 1, DYNAMIC)


def test_ddit_refresh_forces_a_fine_step_after_every_few() -> None:
    policy = DDiTPolicy(warmup="fine", monotone=False, refresh=2, fine_tail=1)
    table = policy.resolve(uniform(10))
    assert table.forced == (0, 0, 0, DYNAMIC, DYNAMIC, 0, DYNAMIC, DYNAMIC, 0, 0)
    assert (table.labels[5], table.labels[9]) == ("refresh", "fine tail")


def test_ddit_paper_rule_has_no_departures() -> None:
    table = DDiTPolicy.paper().resolve(uniform(6))
    assert table.forced == (0, 0, 0, DYNAMIC, DYNAMIC, DYNAMIC)
    assert (table.dwell, table.monotone) == (0, False)
    assert table.coarse_after_fine()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ddit_warm_up_lasts_until_the_difference_exists(order: int) -> None:
    table = DDiTPolicy(order=order, fine_tail=0).resolve(uniform(6))
    assert table.forced.index(DYNAMIC) == order


def test_ddit_short_run_is_all_forced() -> None:
    assert DDiTPolicy().resolve(uniform(2)).forced == (0, 0)
    assert DDiTPolicy(warmup="coarse", fine_tail=1).resolve(uniform(3)).forced == (2, 2, 0)


def test_ddit_tau_per_size_leaves_out_unnamed_sizes() -> None:
    table = DDiTPolicy({"2p": 0.5}, warmup="coarse", criterion="raw").resolve(uniform(8))
    two, four = table.thresholds[4]
    assert two == 0.5
    assert math.isnan(four)
    assert table.forced[0] == 1, "a coarse warm-up takes the coarsest size that has a tau"


@pytest.mark.parametrize("steps", [4, 5])
def test_ddit_default_plans_a_coarse_step_where_none_can_be_judged(steps: int) -> None:
    table = DDiTPolicy().resolve(uniform(steps))
    assert table.forced == (0, 1, *(0,) * (steps - 2))
    assert table.labels[1] == "too few steps to judge"
    assert DDiTPolicy({"4p": 1e-3}).resolve(uniform(steps)).forced[1] == 2


@pytest.mark.parametrize(
    "policy",
    [
        DDiTPolicy.paper(),
        DDiTPolicy(0.0),
        DDiTPolicy(warmup_steps=3),
        DDiTPolicy(fine_tail=4),
        DDiTPolicy(criterion="raw"),
    ],
)
def test_ddit_plans_no_coarse_step_that_is_not_its_default(policy: DDiTPolicy) -> None:
    assert set(policy.resolve(uniform(4)).forced) <= {0, DYNAMIC}


def test_ddit_default_can_act_at_every_step_count() -> None:
    for steps in range(4, 51):
        assert set(DDiTPolicy().resolve(uniform(steps)).forced) > {0}, steps


def test_ddit_normalised_is_raw_at_fifty_uniform_steps() -> None:
    table = DDiTPolicy(criterion="normalised").resolve(uniform(50))
    assert table.thresholds[20] == pytest.approx((1e-3, 1e-3), rel=1e-9)


def test_ddit_normalised_scales_with_the_step_size() -> None:
    table = DDiTPolicy(criterion="normalised", step_exponent=1.4).resolve(uniform(25))
    assert table.thresholds[10][0] == pytest.approx(1e-3 * 2**1.4, rel=1e-9)


def test_monotone_dynamic_steps_may_follow_fine_ones_without_detail() -> None:
    monotone = DDiTPolicy(monotone=True, refresh=None)
    assert not monotone.resolve(uniform(8)).coarse_after_fine()
    assert DDiTPolicy().resolve(uniform(8)).coarse_after_fine()
    assert StaticPolicy(["p", "2p", "p"]).resolve(uniform(3)).coarse_after_fine()
    assert not StaticPolicy("4p:0.5,p").resolve(uniform(8)).coarse_after_fine()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": -1.0}, "tau=-1.0"),
        ({"tau": float("nan")}, "finite"),
        ({"rho": 1.5}, "rho=1.5"),
        ({"order": 4}, "order=4"),
        ({"warmup": "hot"}, "'hot'"),
        ({"warmup_steps": 2}, "needs at least 3"),
        ({"dwell": -1}, "dwell=-1; .*at least 0"),
        ({"refresh": 0, "monotone": False}, "refresh=0"),
        ({"refresh": 2, "monotone": True}, "needs monotone=False"),
        ({"criterion": "cooked"}, "cooked"),
        ({"tau": {"3p": 1.0}}, "powers of two"),
    ],
)
def test_ddit_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDiTPolicy(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy",
    [
        FinePolicy(),
        StaticPolicy("2p:0.5,p"),
        StaticPolicy([4, 2], fine_share=1 / 3),
        DDiTPolicy(tau={"2p": 0.1}, fine_share=0.25),
        SpectralPolicy(0.1, amplitude=3.0, decay=2.0, coarsest="4p"),
    ],
)
def test_policy_survives_json(policy: PatchPolicy) -> None:
    assert policy_from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_policy_from_dict_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'Magic'"):
        policy_from_dict({"policy": "Magic"})
    with pytest.raises(ValueError, match="colour"):
        policy_from_dict({"policy": "DDiTPolicy", "colour": 1})
