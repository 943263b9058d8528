"""A run inside the pipeline's own call: all of it is diffusers' code but the denoising loop.

The pipeline checks its arguments, encodes, draws noise and sets its schedule. Its first step then
calls the transformer once for each pass of guidance, which notes the arguments, and the scheduler,
which runs the whole loop by table and gives the final latents. The steps that are left are skipped,
as those of an interrupted run; where a pipeline knows no interrupt they pass at once: their calls
of the transformer give nothing, and their scheduler the same latents again. What follows, such as
decoding, is the pipeline's again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddit_rt.engine.pipeline_driven import replaced
from ddit_rt.engine.table_driven import Loop
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.loop import RunPlan
from ddit_rt.models.calls import PipelineCall, drop_steps
from ddit_rt.models.family import NEGATIVE
from ddit_rt.planning.outline import Outline
from ddit_rt.solver import falling
from ddit_rt.steps import StepModel
from ddit_rt.torch_state import callers_modes, shielded

RunLoop = Callable[[Tensor, dict[str, Any], Any], Tensor]
"""Runs the loop: initial latents `[B, C, H, W]` in float32, conditioning as of `Engine.denoise`,
and the scheduler as the pipeline has set it; gives final latents of the same shape."""

Planner = Callable[[Mapping[str, Any], Any], tuple[Outline, RunPlan]]
"""Outline and plan of a run, from its conditioning and the scheduler that the pipeline has set."""


class LoopInPipeline:
    """The engine's loop in the place of the pipeline's."""

    def __init__(self, loop: Loop, pipeline: Any, plan: Planner) -> None:
        self._loop, self._pipeline, self._plan = loop, pipeline, plan
        self._bar: Any = None

    def __call__(
        self, models: Sequence[StepModel], call: PipelineCall, arguments: Mapping[str, Any]
    ) -> Any:
        """Runs the pipeline's own call; see `InterceptedRun`."""
        run = InterceptedRun(self._pipeline, models, call, self._run_loop, self._take_bar)
        return run(arguments)

    def _take_bar(self, bar: Any) -> None:
        self._bar = bar

    def _run_loop(self, latents: Tensor, conditioning: dict[str, Any], scheduler: Any) -> Tensor:
        outline, plan = self._plan(conditioning, scheduler)
        final = self._loop.run(
            plan,
            latents,
            lambda _: self._bar.update(),
            # Diffusers' own way to end a run: someone sets this.
            interrupted=lambda: bool(getattr(self._pipeline, "_interrupt", False)),
        )
        self._loop.look_back(outline)
        return final


class InterceptedRun:
    """One call of the pipeline."""

    def __init__(
        self,
        pipeline: Any,
        models: Sequence[StepModel],
        call: PipelineCall,
        run_loop: RunLoop,
        bar: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Prepares it; nothing of the pipeline is touched.

        Args:
            pipeline: The user's.
            models: Its transformer, and experts that take turns with it.
            call: The checked call.
            run_loop: Runs the loop.
            bar: Given the pipeline's progress bar, which the loop is to move.
        """
        self._pipeline, self._models, self._call = pipeline, models, call
        self._family = models[0].family
        self._run_loop, self._bar = run_loop, bar
        self._signature = inspect.signature(type(models[0].transformer).forward)
        self._final: Tensor | None = None
        self._undo = ExitStack()
        self.passes: list[dict[str, Any]] = []

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Runs the pipeline's own call.

        Args:
            arguments: Its keyword arguments.

        Returns:
            What it returns.

        Raises:
            UnsupportedModelError: The pipeline ended without a step, or asked for something that
                the compiled blocks could only ignore.
        """
        with callers_modes(), self._in_place():
            result = self._pipeline(**arguments)
        if self._final is None:
            raise UnsupportedModelError(
                f"{type(self._pipeline).__name__} ended without a step of its scheduler, whose "
                "place the compiled loop takes; this version cannot run it"
            )
        return result

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Stands in for transformers, scheduler and progress bar."""
        # The run's own, as the user's may serve other calls.
        scheduler = copy.deepcopy(self._pipeline.scheduler)
        step = _Step(partial(self._step, scheduler, scheduler.step))
        with self._undo as stack:
            parts = {"forward": self._forward, "_compiled_call_impl": None}
            for model in self._models:
                stack.enter_context(replaced(model.transformer, **parts))
            stack.enter_context(replaced(scheduler, step=step))
            bar = partial(self._progress_bar, self._pipeline.progress_bar)
            stack.enter_context(replaced(self._pipeline, scheduler=scheduler, progress_bar=bar))
            yield

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of a transformer's `forward`: notes a pass of the first step."""
        given = dict(self._signature.bind(None, *args, **kwargs).arguments)
        given.pop("self")
        as_tuple = given.pop("return_dict", True) is False
        if self._final is None:
            transformer, shape = self._models[0].transformer, self._call.shape
            for one in self._family.passes_in(given, shape[0]):
                call = self._family.read_model_call(transformer, shape, one)
                self.passes.append(call.conditioning)
        nothing = self._family.no_output(given)
        if as_tuple:
            return nothing if isinstance(nothing, tuple) else (nothing,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=nothing)

    def _step(
        self, scheduler: Any, own: Any, velocity: Any, timestep: Any, sample: Tensor, **more: Any
    ) -> Any:
        """In the place of the scheduler's `step`: the first one runs the loop."""
        del own, velocity, timestep
        if self._final is None:
            self._final = self._run(scheduler, sample)
            self._skip_the_rest()
        if more.get("return_dict", True) is False:
            return (self._final,)
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=self._final)

    def _skip_the_rest(self) -> None:
        """Ends the pipeline's own loop, whose steps would each cost the host for nothing."""
        pipeline = self._pipeline
        if isinstance(getattr(type(pipeline), "interrupt", None), property):
            self._undo.callback(setattr, pipeline, "_interrupt", pipeline._interrupt)  # noqa: SLF001
            pipeline._interrupt = True  # noqa: SLF001

    @shielded()
    @torch.no_grad()
    def _run(self, scheduler: Any, sample: Tensor) -> Tensor:
        """The loop, from latents in the pipeline's layout to such."""
        conditioning = self._conditioning(sample.device)
        latents = self._family.unpack_latents(sample, self._call.shape).float().contiguous()
        plain = copy.copy(scheduler)
        vars(plain).pop("step")
        drop_steps(plain, getattr(scheduler, "begin_index", None) or 0)
        final = self._run_loop(latents, conditioning, falling(plain))
        return self._family.pack_latents(final.to(sample.dtype))

    def _conditioning(self, device: torch.device) -> dict[str, Any]:
        """As of `Engine.denoise`."""
        # Without guidance there may be room for a pass that only a callback asks for.
        if len(self.passes) not in (self._call.passes, 1 + self._call.guided):
            raise UnsupportedModelError(
                f"{type(self._pipeline).__name__} ran its transformer {len(self.passes)} times in "
                f"its first step; this call was planned for {self._call.passes} passes"
            )
        prompt, *negatives = self.passes
        conditioning = dict(prompt)
        scales = torch.tensor(self._call.scales, dtype=torch.float32, device=device)
        for negative in negatives:
            for name in {*prompt, *negative}:
                conditioning[name] = prompt.get(name)
                conditioning[NEGATIVE + name] = negative.get(name)
        if negatives and len(scales):
            # With one for each expert, where there are several.
            conditioning[self._family.scale] = scales if len(scales) > 1 else scales[0]
        return conditioning

    @contextmanager
    def _progress_bar(self, own: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The pipeline's own bar is the loop's; the pipeline moves none."""
        with own(*args, **kwargs) as bar:
            self._bar(bar)
            yield _StillBar()


class _Step:
    """Stands for the `step` of a scheduler that a pipeline may copy: the same one for all."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> _Step:
        return self


class _StillBar:
    """A progress bar that the loop has moved already."""

    def update(self, *_: Any) -> None:
        """Does nothing."""


class FirstStep:
    """The pipeline's call up to its first step, for whoever goes on by themselves."""

    def __init__(self, pipeline: Any, models: Sequence[StepModel], call: PipelineCall) -> None:
        """Arguments as of `InterceptedRun`."""
        self._found: tuple[Tensor, dict[str, Any], Any] | None = None
        self._run = InterceptedRun(pipeline, models, call, self._stop)

    def __call__(self, arguments: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any], Any]:
        """What a `RunLoop` is given. Noise is drawn: generators go on from where they were."""
        with suppress(_Stopped):
            self._run(arguments)
        assert self._found is not None, "the first step ends the call"
        return self._found

    def passes(self, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Conditioning of every pass; generators are as before, and callbacks are not called."""
        given = {**arguments, "output_type": "latent"}
        generators = given.get("generator") or []
        generators = generators if isinstance(generators, list) else [generators]
        states = [generator.get_state() for generator in generators]
        with torch.random.fork_rng():
            self(given)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return self._run.passes

    def _stop(self, latents: Tensor, conditioning: dict[str, Any], scheduler: Any) -> Tensor:
        self._found = latents, conditioning, scheduler
        raise _Stopped


class _Stopped(Exception):
    """The first step is reached."""
