"""Step caches as text: what a user types in a call or on the command line."""

from __future__ import annotations

from typing import Any

from ddit_rt import checks
from ddit_rt.policies.cache import MagCache, NoCache, StepCache, TeaCache

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
