from __future__ import annotations

import argparse

import pytest

from ddit_rt import DDiTPolicy, FinePolicy
from ddit_rt.cli.policies import choose_policy, parse_tau

DEFAULT = DDiTPolicy(tau={"2p": 3e-3}, dwell=5)


def test_no_option_keeps_the_default() -> None:
    assert choose_policy(None, None, None, DEFAULT) is DEFAULT


def test_dynamic_starts_from_a_dynamic_default() -> None:
    policy = choose_policy("dynamic", 1e-2, 0.6, DEFAULT)
    assert policy == DDiTPolicy(tau=1e-2, rho=0.6, dwell=5)


def test_dynamic_ignores_a_default_of_another_kind() -> None:
    assert choose_policy("dynamic", None, None, FinePolicy()) == DDiTPolicy()


def test_thresholds_alone_mean_dynamic() -> None:
    assert choose_policy(None, None, 0.9, FinePolicy()) == DDiTPolicy(rho=0.9)


def test_thresholds_with_a_fixed_plan_are_refused() -> None:
    with pytest.raises(ValueError, match="belong to --policy dynamic"):
        choose_policy("fine", 1e-3, None, DEFAULT)


def test_tau_for_all_sizes_or_one_each() -> None:
    assert parse_tau("0.002") == 0.002
    assert parse_tau("2p=0.002, 4p=1e-4") == {"2p": 0.002, "4p": 1e-4}
    with pytest.raises(argparse.ArgumentTypeError, match="write one number"):
        parse_tau("2p:0.002")
    with pytest.raises(argparse.ArgumentTypeError, match="got tau=nan"):
        parse_tau("nan")
