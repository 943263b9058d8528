from __future__ import annotations

import pytest

from ddit_rt import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy
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
    ],
)
def test_texts_and_their_policies(text: str, policy: PatchPolicy) -> None:
    assert parse_policy(text, DEFAULT) == policy


def test_dynamic_starts_from_no_default_of_another_kind() -> None:
    assert parse_policy("dynamic", FinePolicy()) == DDiTPolicy()


@pytest.mark.parametrize("text", ["", "quick", "0.5", "Fine", "speedup"])
def test_other_texts_are_none(text: str) -> None:
    assert parse_policy(text, DEFAULT) is None


@pytest.mark.parametrize("text", ["3p:0.5,p", "2p:x,p", "2p:0.9,p:0.9", ":", "2p:nan,p"])
def test_plan_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plan"):
        parse_policy(text, DEFAULT)
