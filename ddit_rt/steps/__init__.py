"""Buckets: the base patch size, and coarse patch sizes that need no training."""

from ddit_rt.steps.base import (
    Blocks,
    Bucket,
    Detail,
    Pass,
    RunContext,
    Runners,
    StepInputs,
    StepModel,
    at_step,
    latent_frames,
    token_velocity,
)
from ddit_rt.steps.buckets import FineBucket, PassesBucket, Resampling, SnrBucket, matched_level
from ddit_rt.steps.first_block import FirstBlock
from ddit_rt.steps.mixed import MixedBucket
from ddit_rt.steps.passes import Passes
from ddit_rt.steps.signal import FirstBlockSignal, InputSignal, LatentSignal, Signal

__all__ = [
    "Blocks",
    "Bucket",
    "Detail",
    "FineBucket",
    "FirstBlock",
    "FirstBlockSignal",
    "InputSignal",
    "LatentSignal",
    "MixedBucket",
    "Pass",
    "Passes",
    "PassesBucket",
    "Resampling",
    "RunContext",
    "Runners",
    "Signal",
    "SnrBucket",
    "StepInputs",
    "StepModel",
    "at_step",
    "latent_frames",
    "matched_level",
    "token_velocity",
]
