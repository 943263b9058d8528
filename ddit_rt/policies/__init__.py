"""Patch policies and step caches, and the plain-data tables that a kernel evaluates."""

from ddit_rt.policies.cache import (
    CacheModel,
    MagCache,
    NoCache,
    ResolvedCache,
    StepCache,
    TeaCache,
    nearest_ratios,
    step_cache_from_dict,
)
from ddit_rt.policies.cache_fit import KINDS, CacheFit, published_fits
from ddit_rt.policies.cache_table import CacheTable
from ddit_rt.policies.cache_written import parse_step_cache
from ddit_rt.policies.patch import (
    DDiTPolicy,
    FinePolicy,
    PatchPolicy,
    Schedule,
    StaticPolicy,
    policy_from_dict,
)
from ddit_rt.policies.patch_table import DYNAMIC, PolicyTable
from ddit_rt.policies.patch_written import POLICY_NAMES, parse_policy
from ddit_rt.policies.sizes import parse_patch, patch_name

__all__ = [
    "DYNAMIC",
    "KINDS",
    "POLICY_NAMES",
    "CacheFit",
    "CacheModel",
    "CacheTable",
    "DDiTPolicy",
    "FinePolicy",
    "MagCache",
    "NoCache",
    "PatchPolicy",
    "PolicyTable",
    "ResolvedCache",
    "Schedule",
    "StaticPolicy",
    "StepCache",
    "TeaCache",
    "nearest_ratios",
    "parse_patch",
    "parse_policy",
    "parse_step_cache",
    "patch_name",
    "policy_from_dict",
    "published_fits",
    "step_cache_from_dict",
]
