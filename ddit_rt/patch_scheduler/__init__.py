"""The patch scheduler: policies, and the plain-data table that a kernel evaluates."""

from ddit_rt.patch_scheduler.policy import (
    DDiTPolicy,
    FinePolicy,
    PatchPolicy,
    Schedule,
    StaticPolicy,
    policy_from_dict,
)
from ddit_rt.patch_scheduler.sizes import parse_patch, patch_name
from ddit_rt.patch_scheduler.table import DYNAMIC, PolicyTable

__all__ = [
    "DYNAMIC",
    "DDiTPolicy",
    "FinePolicy",
    "PatchPolicy",
    "PolicyTable",
    "Schedule",
    "StaticPolicy",
    "parse_patch",
    "patch_name",
    "policy_from_dict",
]
