"""The plans that the demo compares."""

from __future__ import annotations

from dataclasses import dataclass

from ddit_rt.patch_scheduler import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy

FINE, STATIC, DYNAMIC = "fine", "static", "dynamic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to choose patch sizes.

    Attributes:
        name: `"fine"`, `"static"` or `"dynamic"`.
        label: Name for people.
        policy: The policy.
    """

    name: str
    label: str
    policy: PatchPolicy


def demo_plans() -> tuple[Plan, ...]:
    """All-fine, a static plan, and the dynamic policy with thresholds for the demo model."""
    return (
        Plan(name=FINE, label="all fine", policy=FinePolicy()),
        Plan(name=STATIC, label="static plan", policy=StaticPolicy("2p:0.5,p")),
        Plan(name=DYNAMIC, label="dynamic", policy=DDiTPolicy(tau={"2p": 1e-3})),
    )
