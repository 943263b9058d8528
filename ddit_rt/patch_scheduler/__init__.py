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
from ddit_rt.patch_scheduler.written import POLICY_NAMES, parse_policy

__all__ = [
    "DYNAMIC",
    "POLICY_NAMES",
    "DDiTPolicy",
    "FinePolicy",
    "PatchPolicy",
    "PolicyTable",
    "Schedule",
    "StaticPolicy",
    "parse_patch",
    "parse_policy",
    "patch_name",
    "policy_from_dict",
]
