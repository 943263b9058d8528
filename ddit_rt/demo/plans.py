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


# Tuned on the demo model at 24 steps: fine first steps fix the layout that the other pictures are
# compared with, and 7e-4 lies between the scores of plain and of textured backgrounds.
_STATIC = StaticPolicy("p:0.35,2p:0.45,p")
DEMO_POLICY = DDiTPolicy(
    tau={"2p": 7e-4}, warmup="fine", warmup_steps=4, dwell=3, monotone=False, fine_tail=5
)


def demo_plans() -> tuple[Plan, ...]:
    """All-fine, a static plan of about as many tokens as the dynamic one, and the dynamic one."""
    return (
        Plan(name=FINE, label="all fine", policy=FinePolicy()),
        Plan(name=STATIC, label="static plan", policy=_STATIC),
        Plan(name=DYNAMIC, label="dynamic", policy=DEMO_POLICY),
    )
