"""Patch policies as text: what a user types in a call or on the command line."""

from __future__ import annotations

from ddit_rt.policies.patch import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy
from ddit_rt.policies.sizes import is_patch

STATIC_PLAN = "2p:0.4,p"
"""The plan of `"static"`: layout at 2p, then detail at p."""

POLICY_NAMES = ("fine", "static", "dynamic")


def parse_policy(text: str, default: PatchPolicy) -> PatchPolicy | None:
    """The policy that a text stands for; None: it is none of the forms.

    Args:
        text: `"fine"`, `"static"`, `"dynamic"`, or a plan, `"4p:0.2,2p:0.4,p"`.
        default: What `"dynamic"` is, where it is a dynamic policy.

    Raises:
        ValueError: A plan that cannot be read.
    """
    text = text.strip()
    if text == "fine":
        return FinePolicy()
    if text == "dynamic":
        return default if isinstance(default, DDiTPolicy) else DDiTPolicy()
    if text == "static":
        return StaticPolicy(STATIC_PLAN)
    return StaticPolicy(text) if is_patch(text) or set(text) & set(":,") else None
