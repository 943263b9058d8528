"""Patch policies and step caches as text: what a user types in a call or on the command line."""

from __future__ import annotations

from typing import Any

from ddit_rt import checks
from ddit_rt.policies.cache import MagCache, NoCache, StepCache, TeaCache
from ddit_rt.policies.patch import (
    DDiTPolicy,
    FinePolicy,
    PatchPolicy,
    StaticPolicy,
    is_patch,
)

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


_FORMS = "teacache:0.4, teacache-ret:0.1, magcache:0.06, or none"
CACHE_NAMES = ("teacache", "teacache-ret", "magcache", "none")


def parse_step_cache(text: str) -> StepCache:
    """The step cache that a text stands for.

    Args:
        text: `"teacache:THRESHOLD"`, `"teacache-ret:THRESHOLD"` (with `use_ret_steps`),
            `"magcache:THRESHOLD"`, or `"none"`.

    Raises:
        ValueError: Another text, or a threshold that is no finite number of at least 0.
    """
    name, colon, number = text.strip().partition(":")
    if name not in CACHE_NAMES or bool(colon) == (name == "none"):
        advice = "" if name in CACHE_NAMES else checks.did_you_mean(name, CACHE_NAMES)
        raise ValueError(checks.got("step_cache", text, _FORMS, advice))
    if name == "none":
        return NoCache()
    try:
        threshold = checks.number("threshold", float(number), 0)
    except ValueError:
        advice = "the threshold is a finite number of at least 0"
        raise ValueError(checks.got("step_cache", text, _FORMS, advice)) from None
    if name == "magcache":
        return MagCache(threshold)
    return TeaCache(threshold, use_ret_steps=name == "teacache-ret")


def as_step_cache(step_cache: Any) -> StepCache | None:
    """The step cache that a caller passed, by value or as text.

    Raises:
        TypeError: Neither, nor None.
        ValueError: A text that stands for none.
    """
    if isinstance(step_cache, str):
        return parse_step_cache(step_cache)
    expected = 'a step cache, such as TeaCache(0.4), "teacache:0.4", or NoCache()'
    return checks.optional(checks.instance, "step_cache", step_cache, StepCache, expected)
