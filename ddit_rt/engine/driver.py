"""How one call is run: who drives it, its outline and its plan.

Three drive. The loop by table, alone or inside the pipeline's own call (`intercepted.py`); the
pipeline's own loop (`pipeline_driven.py`); and for `Engine.denoise` the scheduler's own steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddit_rt.engine.history import SeenLatents
from ddit_rt.engine.intercepted import FirstStep, LoopInPipeline, Planner
from ddit_rt.engine.pipeline_driven import PipelineRun
from ddit_rt.engine.table_driven import Loop, StepCallback
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.loop import RunPlan
from ddit_rt.models.arguments import check_text_encoders
from ddit_rt.models.calls import PipelineCall
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.outline import Outline, outline_run
from ddit_rt.planning.plan import plan_run
from ddit_rt.planning.request import Request
from ddit_rt.policies import CacheFit
from ddit_rt.solver import ProbedSchedules, SolverTable, own_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """Runs calls of one model, as it is at the time.

    Attributes:
        pipeline: The user's, or None for a bare transformer.
        compiled: The compiled model.
        loop: The engine's loop.
        solver: Schedules that were probed before.
        fits: The artifact's fits of step caches.
    """

    pipeline: Any
    compiled: CompiledModel
    loop: Loop
    solver: ProbedSchedules
    fits: Sequence[CacheFit]

    def call(self, request: Request, given: Mapping[str, Any]) -> Any:
        """A call of the pipeline.

        Args:
            request: What the run is asked to do.
            given: The pipeline's own arguments, checked one by one.

        Returns:
            What the pipeline returns.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        family = self.compiled.steps.family
        call = family.read_call(self.pipeline, scheduler, given)
        request = request.ignoring(call.ignored)
        table, problem = self.solver(scheduler)
        problem = problem or family.own_loop
        outline = self._outline(request, call.shape, scheduler, table, guided=call.guided)
        check_text_encoders(self.pipeline, call.arguments, guided=call.guided)
        if problem or given.get("callback_on_step_end") is not None:
            return self._by_pipeline(outline, call, scheduler, given, problem, request)
        run = LoopInPipeline(self.loop, self.pipeline, self._planner(request, call, outline))
        return run(self.compiled.models, call, given)

    def denoise(
        self,
        request: Request,
        latents: Tensor,
        scheduler: Any,
        conditioning: Mapping[str, Tensor],
        callback: StepCallback | None,
    ) -> Tensor:
        """The denoising loop alone.

        Args:
            request: What the run is asked to do.
            latents: z_0, float32, on the model's device.
            scheduler: The run's own, its timesteps set.
            conditioning: As of `Engine.denoise`, checked.
            callback: Called after every step, by a scheduler that takes its steps itself.

        Returns:
            Final latents.
        """
        table, problem = self.solver(scheduler)
        guided = self.compiled.steps.family.guidance(conditioning) is not None
        outline = self._outline(request, tuple(latents.shape), scheduler, table, guided=guided)
        if problem or callback is not None:
            driver, reason = "the scheduler's own steps", problem or "a callback comes between them"
            outline = self._handed_over(outline, driver, reason, scheduler, aloud=bool(problem))
            plan = plan_run(self.compiled, outline, conditioning)
            final = self.loop.by_scheduler(plan, latents, scheduler, callback)
        else:
            final = self.loop.run(plan_run(self.compiled, outline, conditioning), latents, None)
        self.loop.look_back(outline)
        return final

    def plan(self, request: Request, given: Mapping[str, Any]) -> tuple[RunPlan, Tensor]:
        """Plan and z_0 of a call of the pipeline; nothing has run.

        Raises:
            UnsupportedModelError: Only the pipeline's own loop can take the model's steps.
        """
        if reason := self.compiled.steps.family.own_loop:
            raise UnsupportedModelError(f"no plan can be made of this run: {reason}")
        call, (latents, *found) = self.set_up(given)
        _, plan = self._planner(request, call)(*found)
        return plan, latents

    def set_up(
        self, given: Mapping[str, Any]
    ) -> tuple[PipelineCall, tuple[Tensor, dict[str, Any], Any]]:
        """A call as it is read; z_0, conditioning and scheduler of its first step."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        call = self.compiled.steps.family.read_call(self.pipeline, scheduler, given)
        return call, FirstStep(self.pipeline, self.compiled.models, call)(given)

    def _planner(
        self, request: Request, call: PipelineCall, expected: Outline | None = None
    ) -> Planner:
        """Outlines and plans a run whose scheduler the pipeline itself has set.

        Args:
            request: What the run is asked to do.
            call: The call as it was read.
            expected: The run with the schedule that was read for it.
        """

        def plan(conditioning: Mapping[str, Any], scheduler: Any) -> tuple[Outline, RunPlan]:
            table, problem = self.solver(scheduler)
            if problem:
                raise UnsupportedModelError(f"{problem}; a run by table needs another scheduler")
            outline = expected
            if outline is None or outline.solver is not table:
                outline = self._outline(request, call.shape, scheduler, table, guided=call.guided)
            return outline, plan_run(self.compiled, outline, conditioning)

        return plan

    def _outline(
        self,
        request: Request,
        shape: tuple[int, ...],
        scheduler: Any,
        solver: SolverTable,
        *,
        guided: bool,
    ) -> Outline:
        """Fixes the run but for its prompt."""
        if self.compiled.rebind():
            self.loop.executor.forget()
        family = self.compiled.steps.family
        outline = outline_run(
            self.compiled,
            request,
            shape=shape,
            timesteps=family.linear_timesteps(scheduler),
            solver=solver,
            guided=guided,
            fits=self.fits,
            experts=family.expert_steps(self.pipeline, scheduler),
        )
        self.loop.announce(outline.warnings)
        return outline

    def _handed_over(
        self, outline: Outline, driver: str, reason: str, scheduler: Any, *, aloud: bool
    ) -> Outline:
        """The outline of a run whose steps something else takes; says so where it is slower."""
        outline = outline.driven_by(driver, reason, own_steps(scheduler), aloud=aloud)
        self.loop.announce(outline.warnings)
        return outline

    def _by_pipeline(
        self,
        outline: Outline,
        call: PipelineCall,
        scheduler: Any,
        given: Mapping[str, Any],
        problem: str,
        request: Request,
    ) -> Any:
        """Runs the pipeline's own call; see `pipeline_driven.py`."""
        reason = problem or "callback_on_step_end may see and change all that it does"
        if call.passes > 1 and request.batched_guidance:
            reason += "; the passes of guidance run one after the other"
        table = None if problem or not outline.scored else outline.solver
        driver = "the pipeline's own loop"
        outline = self._handed_over(outline, driver, reason, scheduler, aloud=bool(problem))
        family = self.compiled.steps.family
        scales = [call.scales[expert] for expert in outline.experts] if call.guided else []
        seen = SeenLatents(family, call.shape, table, scales)
        with self.loop.driven("pipeline", outline.steps) as run:
            drive = PipelineRun(self.pipeline, self.compiled, outline, call, run, seen)
            if call.passes > 1 and family.rehearsed:
                first = FirstStep(self.pipeline, self.compiled.models, call)
                drive.rehearsed = first.passes(given)
            result = drive(given)
        self.loop.look_at(seen.latest)
        self.loop.look_back(outline)
        return result
