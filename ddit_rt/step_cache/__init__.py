"""Step caches: policies that let a step reuse instead of compute, and the table of one run."""

from ddit_rt.step_cache.fit import KINDS, CacheFit, published_fits
from ddit_rt.step_cache.policy import (
    CacheModel,
    MagCache,
    NoCache,
    ResolvedCache,
    StepCache,
    TeaCache,
    nearest_ratios,
    step_cache_from_dict,
)
from ddit_rt.step_cache.table import CacheTable
from ddit_rt.step_cache.written import parse_step_cache

__all__ = [
    "KINDS",
    "CacheFit",
    "CacheModel",
    "CacheTable",
    "MagCache",
    "NoCache",
    "ResolvedCache",
    "StepCache",
    "TeaCache",
    "nearest_ratios",
    "parse_step_cache",
    "published_fits",
    "step_cache_from_dict",
]
