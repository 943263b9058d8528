"""How a caller follows a run, step by step, and ends it early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ddit_rt.loop import RunPlan
from ddit_rt.policies import patch_name


@dataclass(frozen=True, kw_only=True, slots=True)
class StepView:
    """A step that is over.

    Attributes:
        step: Index k of the step.
        steps: Number of steps of the run.
        patch_size: The patch size that it took, by name.
        reused: Whether it reused a residual in place of the blocks.
        sigmas: Noise level before it and after it.
        latents: z_{k+1}, `[B, C, H, W]`, of a video `[B, C, F, H, W]`, float32, on the model's
            device; the callee's own.
    """

    step: int
    steps: int
    patch_size: str
    reused: bool
    sigmas: tuple[float, float]
    latents: Tensor

    @classmethod
    def of(cls, plan: RunPlan, step: int, branch: int, latents: Tensor) -> StepView:
        """What a plan's step did.

        Args:
            plan: The plan of the run.
            step: Index k of the step.
            branch: The branch that it took, as `StepSession.decide` gives it.
            latents: The latents after it, z_{k+1}.
        """
        reused, bucket = divmod(branch, len(plan.offered))
        levels = plan.solver.sigmas
        return cls(
            step=step,
            steps=plan.policy.steps,
            patch_size=patch_name(plan.offered[bucket]),
            reused=bool(reused),
            sigmas=(levels[step], levels[step + 1]),
            latents=latents,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunWatch:
    """What a caller wants of a run; both are called in the thread of the run.

    Attributes:
        stopped: Asked before every step; once true, the run ends with `RunCancelled`. Unlike
            `Engine.cancel`, which is for the run in progress, this counts for a run to come too.
        stepped: Told of every step. On CUDA the host then comes between the steps, where a run
            is one launch otherwise; the trace says so.
    """

    stopped: Callable[[], bool] | None = None
    stepped: Callable[[StepView], None] | None = None


UNWATCHED = RunWatch()
