from __future__ import annotations

import pytest

from ddit_rt import DDiTPolicy, FinePolicy, PatchPolicy, SpectralPolicy, StaticPolicy
from ddit_rt.policies import parse_policy

DEFAULT = DDiTPolicy(0.5)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("fine", FinePolicy()),
        (" static ", StaticPolicy("2p:0.4,p")),
        ("dynamic", DEFAULT),
        ("p", StaticPolicy("p")),
        ("4p:0.2,2p:0.4,p", StaticPolicy("4p:0.2,2p:0.4,p")),
        ("spectral", SpectralPolicy()),
        (" spectral:0.05 ", SpectralPolicy(0.05)),
        ("mixed:0.25", DDiTPolicy(0.5, fine_share=0.25)),
        ("mixed:0.1:static", StaticPolicy("2p:0.4,p", fine_share=0.1)),
        ("mixed:0.5:4p:0.2,p", StaticPolicy("4p:0.2,p", fine_share=0.5)),
    ],
)
def test_texts_and_their_policies(text: str, policy: PatchPolicy) -> None:
    assert parse_policy(text, DEFAULT) == policy


def test_dynamic_starts_from_no_default_of_another_kind() -> None:
    assert parse_policy("dynamic", FinePolicy()) == DDiTPolicy()


@pytest.mark.parametrize("text", ["", "quick", "0.5", "Fine", "speedup"])
def test_other_texts_are_none(text: str) -> None:
    assert parse_policy(text, DEFAULT) is None


@pytest.mark.parametrize(
    "text",
    ["mixed", "mixed:", "mixed:1", "mixed:0", "mixed:x", "mixed:0.5:fine", "mixed:0.5:mixed:0.2"],
)
def test_a_share_that_leaves_nothing_mixed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"mixed:SHARE with a share of the regions above 0"):
        parse_policy(text, DEFAULT)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_is_at_least_none_and_below_all(share: float) -> None:
    for make in (DDiTPolicy, lambda **given: StaticPolicy("2p:0.5,p", **given)):
        with pytest.raises(ValueError, match="fine_share"):
            make(fine_share=share)


@pytest.mark.parametrize("plan", ["p", ["p", "p"], "p:0.5,p"])
def test_a_share_of_a_plan_without_a_coarse_step_is_refused(plan: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"fine_share=0.25 for the plan .*no step is coarse"):
        StaticPolicy(plan, fine_share=0.25)


@pytest.mark.parametrize("text", ["3p:0.5,p", "2p:x,p", "2p:0.9,p:0.9", ":", "2p:nan,p"])
def test_plan_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plan"):
        parse_policy(text, DEFAULT)
