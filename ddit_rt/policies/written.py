"""Patch policies and step caches as text: what a user types in a call or on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ddit_rt import checks
from ddit_rt.policies.cache import MagCache, NoCache, StepCache, TeaCache
from ddit_rt.policies.cache_without_fit import FirstBlockCache, SeaCache, StaticCache
from ddit_rt.policies.ddit import DDiTPolicy
from ddit_rt.policies.patch import PatchPolicy, is_patch
from ddit_rt.policies.spectral import SpectralPolicy
from ddit_rt.policies.static import FinePolicy, StaticPolicy

_Described = TypeVar("_Described", PatchPolicy, StepCache)

STATIC_PLAN = "2p:0.4,p"
"""The plan of `"static"`: layout at 2p, then detail at p."""

POLICY_NAMES = ("fine", "static", "dynamic", "spectral")


def parse_policy(text: str, default: PatchPolicy) -> PatchPolicy | None:
    """The policy that a text stands for; None: it is none of the forms.

    Args:
        text: `"fine"`, `"static"`, `"dynamic"`, `"spectral"` or `"spectral:DELTA"`, or a plan,
            `"4p:0.2,2p:0.4,p"`; or `"mixed:SHARE"`, the dynamic one with that `fine_share`,
            with `":static"` or `":PLAN"` behind it for another.
        default: What `"dynamic"` is, where it is a dynamic policy.

    Raises:
        ValueError: A plan, a delta or a share that cannot be read.
    """
    text = text.strip()
    if text == "fine":
        return FinePolicy()
    if text == "dynamic":
        return default if isinstance(default, DDiTPolicy) else DDiTPolicy()
    if text == "static":
        return StaticPolicy(STATIC_PLAN)
    name, colon, rest = text.partition(":")
    if name == "spectral":
        return _spectral(text, rest) if colon else SpectralPolicy()
    if name == "mixed":
        return _mixed(text, rest, default)
    return StaticPolicy(text) if is_patch(text) or set(text) & set(":,") else None


def _spectral(text: str, delta: str) -> SpectralPolicy:
    try:
        return SpectralPolicy(float(delta))
    except ValueError:
        expected = "spectral:DELTA with a number above 0 and below 1, such as spectral:0.05"
        raise ValueError(checks.got("patch_policy", text, expected)) from None


def _mixed(text: str, rest: str, default: PatchPolicy) -> PatchPolicy:
    share, _, own = rest.partition(":")
    policy = None if own.startswith("mixed") else parse_policy(own or "dynamic", default)
    try:
        if isinstance(policy, (DDiTPolicy, StaticPolicy)) and float(share) > 0:
            return replace(policy, fine_share=float(share))
    except ValueError:
        pass
    expected = (
        "mixed:SHARE with a share of the regions above 0 and below 1, such as mixed:0.25, and "
        "perhaps a plan with coarse steps behind it, mixed:0.25:2p:0.5,p"
    )
    raise ValueError(checks.got("patch_policy", text, expected))


def policy_from_dict(data: Mapping[str, Any]) -> PatchPolicy:
    """The policy that `PatchPolicy.to_dict` described.

    Raises:
        ValueError: An unknown policy or an unknown or malformed field.
    """
    classes: tuple[type[PatchPolicy], ...] = (FinePolicy, StaticPolicy, DDiTPolicy, SpectralPolicy)
    return _from_dict(data, "policy", classes)


_FORMS = (
    "teacache:0.4, teacache-ret:0.1, magcache:0.06, seacache:0.25, firstblockcache:0.05, static:2 "
    "(or with a residual_order behind it, static:2:1), or none"
)


def parse_step_cache(text: str) -> StepCache:
    """The step cache that a text stands for.

    Args:
        text: `"teacache:THRESHOLD"`, `"teacache-ret:THRESHOLD"` (with `use_ret_steps`),
            `"magcache:THRESHOLD"`, `"seacache:THRESHOLD"`, `"firstblockcache:THRESHOLD"`,
            `"static:STEPS"` (steps from one that computes to the next), each with `":0"` or `":1"`
            behind it for its `residual_order`; or `"none"`.

    Raises:
        ValueError: Another text, or a number that the cache does not take.
    """
    name, *numbers = text.strip().split(":")
    if name not in CACHE_NAMES or len(numbers) not in ((0,) if name == "none" else (1, 2)):
        advice = "" if name in CACHE_NAMES else checks.did_you_mean(name, CACHE_NAMES)
        raise ValueError(checks.got("step_cache", text, _FORMS, advice))
    if name == "none":
        return NoCache()
    try:
        options = {"residual_order": int(numbers[1])} if len(numbers) > 1 else {}
        return _CACHES[name](float(numbers[0]), **options)
    except ValueError:
        advice = "numbers are finite and not negative, steps at least 1, an order 0 or 1"
        raise ValueError(checks.got("step_cache", text, _FORMS, advice)) from None


_CACHES: Mapping[str, Callable[..., StepCache]] = {
    "teacache": TeaCache,
    "teacache-ret": partial(TeaCache, use_ret_steps=True),
    "magcache": MagCache,
    "seacache": SeaCache,
    "firstblockcache": FirstBlockCache,
    "static": StaticCache,
}
CACHE_NAMES = (*_CACHES, "none")


def step_cache_from_dict(data: Mapping[str, Any]) -> StepCache:
    """The step cache that `StepCache.to_dict` described.

    Raises:
        ValueError: An unknown cache or an unknown or malformed field.
    """
    classes: tuple[type[StepCache], ...] = (
        NoCache,
        TeaCache,
        MagCache,
        SeaCache,
        FirstBlockCache,
        StaticCache,
    )
    return _from_dict(data, "step_cache", classes)


def _from_dict(
    data: Mapping[str, Any], key: str, classes: Sequence[type[_Described]]
) -> _Described:
    kinds = {cls.__name__: cls for cls in classes}
    fields, what = dict(data), key.replace("_", " ")
    name = fields.pop(key, None)
    if name not in kinds:
        plural = {"policy": "policies", "step cache": "step caches"}[what]
        raise ValueError(f"got {what} {name!r}; known {plural} are {sorted(kinds)}")
    try:
        return kinds[name](**fields)
    except TypeError as error:
        raise ValueError(f"bad fields for {name}: {sorted(fields)} ({error})") from error


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
