"""Executors: who runs the step loop, and the trace of what it did."""

from ddit_rt.executor.base import CachePlan, Executor, ProgressCallback, RunPlan, StepSession
from ddit_rt.executor.capture import CaptureReport
from ddit_rt.executor.cpu import CpuExecutor
from ddit_rt.executor.cuda import FORMS, CudaExecutor
from ddit_rt.executor.graphs import GraphDevice, TorchGraphs
from ddit_rt.executor.trace import RunTrace, StepRecord

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
