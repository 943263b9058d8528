"""Executors: who runs the step loop, and the trace of what it did."""

import torch

from ddit_rt.loop.cpu import CpuExecutor
from ddit_rt.loop.cuda import FORMS, CudaExecutor
from ddit_rt.loop.graphs import GraphDevice, TorchGraphs
from ddit_rt.loop.protocol import (
    CachePlan,
    CaptureReport,
    Executor,
    ProgressCallback,
    RunPlan,
    StepSession,
    StepWatch,
)
from ddit_rt.loop.trace import IDLE_CACHE, IDLE_POLICY, RunTrace, StepRecord

__all__ = [
    "FORMS",
    "IDLE_CACHE",
    "IDLE_POLICY",
    "CachePlan",
    "CaptureReport",
    "CpuExecutor",
    "CudaExecutor",
    "Executor",
    "GraphDevice",
    "ProgressCallback",
    "RunPlan",
    "RunTrace",
    "StepRecord",
    "StepSession",
    "StepWatch",
    "TorchGraphs",
    "executor_for",
]


def executor_for(device: torch.device) -> Executor:
    """The executor of a model on a device."""
    return CudaExecutor(TorchGraphs(device)) if device.type == "cuda" else CpuExecutor()
