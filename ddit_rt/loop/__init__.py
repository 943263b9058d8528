"""Executors: who runs the step loop, and the trace of what it did."""

from ddit_rt.loop.capture import CaptureReport
from ddit_rt.loop.cpu import CpuExecutor
from ddit_rt.loop.cuda import FORMS, CudaExecutor
from ddit_rt.loop.graphs import GraphDevice, TorchGraphs
from ddit_rt.loop.protocol import CachePlan, Executor, ProgressCallback, RunPlan, StepSession
from ddit_rt.loop.trace import RunTrace, StepRecord

__all__ = [
    "FORMS",
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
    "TorchGraphs",
]
