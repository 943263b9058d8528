"""The step loop of one engine: what drives it, how it ends early, and its latest trace."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ddit_rt.errors import RunCancelled
from ddit_rt.executor import (
    CaptureReport,
    CpuExecutor,
    CudaExecutor,
    ProgressCallback,
    RunPlan,
    RunTrace,
    StepCallback,
    TorchGraphs,
)
from ddit_rt.pipeline.callbacks import follow_replaced


class Loop:
    """Runs plans, one at a time.

    Args:
        device: The model's.

    Attributes:
        trace: Of the latest run, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.trace: RunTrace | None = None
        self._executor = (
            CudaExecutor(TorchGraphs(device)) if device.type == "cuda" else CpuExecutor()
        )
        self._cancelled = threading.Event()

    @property
    def form(self) -> str:
        """How a CUDA run is driven, as `Engine.executor` has it."""
        return self._executor.form if isinstance(self._executor, CudaExecutor) else "auto"

    @form.setter
    def form(self, form: str) -> None:
        if isinstance(self._executor, CudaExecutor):
            self._executor.form = form

    @property
    def captures(self) -> tuple[CaptureReport, ...]:
        """What capturing CUDA graphs took, per shape that is captured now; empty on a CPU."""
        return self._executor.captures if isinstance(self._executor, CudaExecutor) else ()

    def forget(self) -> None:
        """Drops captured graphs, because the weights that they read are elsewhere now."""
        if isinstance(self._executor, CudaExecutor):
            self._executor.forget()

    def cancel(self) -> None:
        """Ends the current run between two steps; from any thread."""
        self._cancelled.set()

    def run(
        self,
        plan: RunPlan,
        latents: Tensor,
        on_step_end: StepCallback | None,
        on_progress: ProgressCallback | None,
        *,
        interrupted: Callable[[], bool],
        annotate: bool,
    ) -> Tensor:
        """Runs a plan to its end.

        Args:
            plan: The plan.
            latents: z_0, as in `Engine.denoise`.
            on_step_end: As in `Executor.run`; what it returns enters as the scheduler takes it.
            on_progress: As in `Executor.run`.
            interrupted: Asked before every step, beside `cancel`.
            annotate: Whether profilers see named ranges.

        Returns:
            Final latents; `trace` is the run's.

        Raises:
            ValueError: The initial latents are not finite.
            RunCancelled: `cancel` was called.
        """
        self._cancelled.clear()
        finite = FiniteCheck(latents)
        pending = None
        if on_step_end is not None:
            plan, on_step_end, pending = follow_replaced(plan, latents, on_step_end)
        final, self.trace = self._executor.run(
            plan,
            latents,
            on_step_end=on_step_end,
            on_progress=on_progress,
            should_stop=lambda: interrupted() or self._cancelled.is_set(),
            annotate=annotate,
        )
        if pending is not None:
            final += pending  # what no further step used
        finite.require()
        if self._cancelled.is_set():
            raise RunCancelled(f"cancelled after {len(self.trace)} of {plan.policy.steps} steps")
        if self.trace.nonfinite:
            warnings.warn(
                "the latents became NaN or infinite during the run; the patch scheduler fell "
                "back to p, and the result is not usable (check the model's dtype and weights)",
                stacklevel=5,  # behind `Engine._run`, the engine's call and its no_grad: the caller
            )
        return final


class FiniteCheck:
    """Refuses initial latents that are not finite: before the run, or after it on a device.

    There the answer is on its way while the run goes on, so that the host need not wait for it.
    """

    def __init__(self, latents: Tensor) -> None:
        finite = torch.isfinite(latents).all()
        if finite.is_cuda:
            self._finite = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._finite.copy_(finite, non_blocking=True)
        else:
            self._finite = finite
            self.require()

    def require(self) -> None:
        """Raises if they were not finite. On a device: only once the run is over."""
        if not bool(self._finite):
            raise ValueError("the initial latents hold NaN or infinity; give finite noise")
