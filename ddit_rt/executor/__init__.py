"""Executors: who runs the step loop, and the trace of what it did."""

from ddit_rt.executor.cpu import CpuExecutor, RunPlan, StepCallback
from ddit_rt.executor.trace import RunTrace, StepRecord

__all__ = ["CpuExecutor", "RunPlan", "RunTrace", "StepCallback", "StepRecord"]
