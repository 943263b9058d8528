"""Patch policies and step caches, and the plain-data tables that a kernel evaluates."""

from ddit_rt.policies.cache import (
    CacheModel,
    CacheTable,
    MagCache,
    NoCache,
    StepCache,
    TeaCache,
    nearest_ratios,
)
from ddit_rt.policies.cache_fit import CACHE_KINDS, CacheFit, published_fits
from ddit_rt.policies.cache_without_fit import FirstBlockCache, SeaCache, StaticCache
from ddit_rt.policies.ddit import DDiTPolicy
from ddit_rt.policies.patch import (
    DYNAMIC,
    PatchPolicy,
    PolicyTable,
    Schedule,
    parse_patch,
    patch_name,
)
from ddit_rt.policies.published import published_fast_plan
from ddit_rt.policies.spectral import SpectralPolicy, published_spectrum
from ddit_rt.policies.static import FinePolicy, StaticPolicy
from ddit_rt.policies.written import (
    POLICY_NAMES,
    as_step_cache,
    parse_policy,
    parse_step_cache,
    policy_from_dict,
    step_cache_from_dict,
)

__all__ = [
    "CACHE_KINDS",
    "DYNAMIC",
    "POLICY_NAMES",
    "CacheFit",
    "CacheModel",
    "CacheTable",
    "DDiTPolicy",
    "FinePolicy",
    "FirstBlockCache",
    "MagCache",
    "NoCache",
    "PatchPolicy",
    "PolicyTable",
    "Schedule",
    "SeaCache",
    "SpectralPolicy",
    "StaticCache",
    "StaticPolicy",
    "StepCache",
    "TeaCache",
    "as_step_cache",
    "nearest_ratios",
    "parse_patch",
    "parse_policy",
    "parse_step_cache",
    "patch_name",
    "policy_from_dict",
    "published_fast_plan",
    "published_fits",
    "published_spectrum",
    "step_cache_from_dict",
]
