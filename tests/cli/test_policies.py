from __future__ import annotations

import argparse
from typing import Any

import pytest

from ddit_rt import DDiTPolicy, FinePolicy, PatchPolicy
from ddit_rt.cli.policies import choose_policy, parse_tau

DEFAULT = DDiTPolicy(tau={"2p": 3e-3}, dwell=5)


@pytest.mark.parametrize(
    ("options", "default", "policy"),
    [
        ((None, None, None), DEFAULT, DEFAULT),
        (("dynamic", 1e-2, 0.6), DEFAULT, DDiTPolicy(tau=1e-2, rho=0.6, dwell=5)),
        (("dynamic", None, None), FinePolicy(), DDiTPolicy()),
        ((None, None, 0.9), FinePolicy(), DDiTPolicy(rho=0.9)),
    ],
)
def test_thresholds_mean_a_dynamic_policy_that_starts_from_the_default(
    options: tuple[Any, ...], default: PatchPolicy, policy: PatchPolicy
) -> None:
    assert choose_policy(*options, default) == policy


def test_tau_for_all_sizes_or_one_each() -> None:
    assert parse_tau("0.002") == 0.002
    assert parse_tau("2p=0.002, 4p=1e-4") == {"2p": 0.002, "4p": 1e-4}
    with pytest.raises(argparse.ArgumentTypeError, match="write one number"):
        parse_tau("2p:0.002")
