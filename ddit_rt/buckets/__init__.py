"""Buckets: the base patch size, and coarse patch sizes that need no training."""

from ddit_rt.buckets.base import (
    Bucket,
    Detail,
    RunContext,
    Runners,
    StepModel,
    at_step,
    latent_frames,
    token_velocity,
)
from ddit_rt.buckets.fine import FineBucket
from ddit_rt.buckets.guided import GuidedBucket
from ddit_rt.buckets.replaced import ReplacedBucket
from ddit_rt.buckets.snr import SnrBucket, matched_level

__all__ = [
    "Bucket",
    "Detail",
    "FineBucket",
    "GuidedBucket",
    "ReplacedBucket",
    "RunContext",
    "Runners",
    "SnrBucket",
    "StepModel",
    "at_step",
    "latent_frames",
    "matched_level",
    "token_velocity",
]
