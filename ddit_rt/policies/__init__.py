"""Patch policies and step caches, and the plain-data tables that a kernel evaluates."""

from ddit_rt.policies.cache import (
    CacheModel,
    MagCache,
    NoCache,
    StepCache,
    TeaCache,
    nearest_ratios,
    step_cache_from_dict,
)
from ddit_rt.policies.cache_fit import KINDS, CacheFit, published_fits
from ddit_rt.policies.cache_table import CacheTable
from ddit_rt.policies.cache_written import as_step_cache, parse_step_cache
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
    "Schedule",
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
    "published_fits",
    "step_cache_from_dict",
]
