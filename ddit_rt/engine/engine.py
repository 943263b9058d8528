"""The engine: what a user calls in place of the diffusers pipeline."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddit_rt import checks
from ddit_rt.artifact import Artifact
from ddit_rt.engine.driver import Driver
from ddit_rt.engine.inputs import (
    check_artifact,
    check_call,
    check_executor,
    check_latents,
    check_schedule,
    check_scheduler,
)
from ddit_rt.engine.observed import observed
from ddit_rt.engine.styled import Styled
from ddit_rt.engine.table_driven import Loop, StepCallback
from ddit_rt.engine.watch import UNWATCHED, RunWatch
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.loop import CaptureReport, RunPlan, RunTrace
from ddit_rt.lora.loras import Loras
from ddit_rt.models.arguments import check_callback
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.request import (
    WHOLE_RUN,
    PolicyChoice,
    Request,
    default_policy,
    default_step_cache,
    read_request,
    requested_steps,
)
from ddit_rt.policies import PatchPolicy, StepCache, patch_name
from ddit_rt.solver import ProbedSchedules
from ddit_rt.steps import latent_frames
from ddit_rt.torch_state import shielded

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ddit_rt.engine.typed import CallArguments, PipelineOutput


class Engine(Styled):
    """A compiled model, ready to generate.

    Made by `ddit_rt.compile` or `ddit_rt.load`, not directly. Calls from several threads queue.
    No state passes from one run to the next. The denoising loop runs in the model's own dtype,
    whatever autocast the caller is in; text encoders, VAE and callbacks run as the caller has it.

    Attributes:
        pipeline: The diffusers pipeline, or None for a bare transformer.
    """

    # A misspelt attribute is an AttributeError.
    __slots__ = (
        "__weakref__",
        "_artifact",
        "_batched_guidance",
        "_compiled",
        "_device",
        "_lock",
        "_loop",
        "_loras",
        "_solver",
        "pipeline",
    )

    def __init__(
        self,
        compiled: CompiledModel,
        artifact: Artifact,
        pipeline: Any = None,
        *,
        executor: str = "auto",
        batched_guidance: bool = True,
    ) -> None:
        self.pipeline = pipeline
        self._batched_guidance = batched_guidance
        self._compiled = compiled
        self._artifact = artifact
        self._device = compiled.steps.device
        self._loop = Loop(self._device)
        self._solver = ProbedSchedules()
        self.executor = executor
        self._lock = threading.RLock()
        self._loras = Loras()

    def __repr__(self) -> str:
        """Model, patch sizes, defaults, device and state, on one line."""
        model, manifest = self._compiled.steps, self._artifact.manifest
        parts = [
            type(self.pipeline or model.transformer).__name__,
            "sizes=" + ",".join(map(patch_name, self._compiled.multiples)),
            f"policy={self.default_policy!r}",
            f"step_cache={self.default_step_cache!r}",
            f"device={self._device}",
            f"dtype={str(model.dtype).removeprefix('torch.')}",
            f"executor={self.executor}",
            "backend=" + ("aot" if manifest.packages else "eager"),
            f"loras={self._loras.weights}" if self._loras.weights else "",
            f"artifact={self._artifact.directory}" if self._artifact.directory else "",
        ]
        return f"Engine({', '.join(part for part in parts if part)})"

    @property
    def artifact(self) -> Artifact:
        """What was compiled: manifest and files. May be set, to one with a calibration or a fit."""
        return self._artifact

    @artifact.setter
    def artifact(self, artifact: Artifact) -> None:
        self._artifact = check_artifact(artifact, self._artifact)

    @property
    def annotate(self) -> bool:
        """Whether profilers see named ranges of a run; see `loop.trace.ranges`. May be set."""
        return self._loop.annotate

    @annotate.setter
    def annotate(self, annotate: bool) -> None:
        self._loop.annotate = checks.flag("annotate", annotate)

    @property
    def batched_guidance(self) -> bool:
        """Whether the cond and uncond passes of guidance run as one batch of two. May be set.

        That is the default; one after the other, they take less memory. Where the pipeline's own
        loop drives, they come one after the other.
        """
        return self._batched_guidance

    @batched_guidance.setter
    def batched_guidance(self, batched: bool) -> None:
        self._batched_guidance = checks.flag("batched_guidance", batched)

    @property
    def executor(self) -> str:
        """How a CUDA run is driven; may be set between runs.

        `"loop"`: one graph launch per image. `"step"`: one per step. `"host"`: the host chooses
        each step's graph; slowest, for profilers. `"auto"`: `loop`. Where something else takes the
        steps, the pipeline's own loop or a scheduler, it launches every step's graph, whatever is
        set here; `last_trace` says which, and why. A CPU model has only `"auto"`.
        """
        return self._loop.executor.form

    @executor.setter
    def executor(self, form: str) -> None:
        check_executor(form, self._compiled.steps.transformer)
        self._loop.executor.form = form

    @property
    def captures(self) -> tuple[CaptureReport, ...]:
        """What capturing CUDA graphs took, per shape that is captured now; empty on a CPU."""
        return self._loop.executor.captures

    @property
    def last_trace(self) -> RunTrace | None:
        """The trace of the latest run, or None."""
        return self._loop.trace

    @property
    def default_policy(self) -> PatchPolicy:
        """The policy of a call that names none: the artifact's own, else `DDiTPolicy()`."""
        return default_policy(self._artifact.manifest)

    @property
    def default_step_cache(self) -> StepCache:
        """The step cache of a call that names none: the artifact's own, else `NoCache()`."""
        return default_step_cache(self._artifact.manifest)

    @shielded()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        patch_policy: PolicyChoice | None = None,
        guidance_interval: tuple[float, float] = WHOLE_RUN,
        step_cache: StepCache | str | None = None,
        watch: RunWatch = UNWATCHED,
        **arguments: Unpack[CallArguments],
    ) -> PipelineOutput:
        """Generates, as the pipeline's own call does.

        Args:
            prompt: Prompt or prompts.
            patch_policy: Which patch size each step takes: a policy, by value or as text (`"fine"`,
                `"static"`, `"dynamic"`, `"spectral:0.05"`, `"mixed:0.25"`, `"4p:0.2,2p:0.4,p"`);
                or, from the artifact's calibration for this number of steps, a preset
                (`"quality"`, `"balanced"`, `"fast"`) or a speed between 0 and 1, which may run
                fewer steps. Without any calibration `"fast"` is what is published for the model's
                family, where something is, and the trace says so. By default the artifact's
                policy.
            guidance_interval: `start` and `stop` of diffusers' guiders: classifier-free guidance
                acts in this part of the steps; elsewhere the pass with the prompt is all that runs.
            step_cache: Which steps reuse instead of compute, `SeaCache(0.25)` or `"seacache:0.25"`,
                and `NoCache()` or `"none"` for none; by default what the plan was calibrated with
                where `patch_policy` names one, else the artifact's.
            watch: Follows the run and may end it; see `RunWatch`.
            arguments: Every other argument of the pipeline's `__call__`, with its defaults;
                `height` and `width` default to those given to `compile`, and `latents` are in the
                pipeline's own layout, which for FLUX is packed. With a
                `callback_on_step_end`, or a scheduler that is no fixed table (it draws noise,
                say), the pipeline's own loop drives the compiled model, so that the callback may
                see and change all that it may in diffusers.

        Returns:
            What the pipeline returns; `last_trace` says what the run did.

        Raises:
            ShapeError: A size that the compiled blocks or the policy cannot run.
            ValueError, TypeError: An unknown argument, or a value that is none for its name; a
                preset or speed without a calibration for this number of steps, or a step cache
                without a fit for this model.
            UnsupportedModelError: An argument that the compiled model could only ignore.
            RunCancelled: `cancel` was called, or the watch stopped the run.
        """
        checks.instance("watch", watch, RunWatch, "RunWatch(stopped=..., stepped=...)")
        with self._lock, self._loop.watched(watch), observed("call", self._loop) as asked:
            self._check_state()
            given, request = self.read_call(
                prompt,
                patch_policy=patch_policy,
                guidance_interval=guidance_interval,
                step_cache=step_cache,
                **arguments,
            )
            asked(request)
            if request.num_inference_steps is not None:
                given["num_inference_steps"] = request.num_inference_steps
            if request.sigmas is not None:
                given["sigmas"] = list(request.sigmas)
            output: PipelineOutput = self._driver().call(request, given)
            return output

    def read_call(
        self,
        prompt: str | list[str] | None = None,
        *,
        patch_policy: PolicyChoice | None = None,
        guidance_interval: tuple[float, float] = WHOLE_RUN,
        step_cache: StepCache | str | None = None,
        **arguments: Unpack[CallArguments],
    ) -> tuple[dict[str, Any], Request]:
        """Checks the arguments of a call, each by itself, and runs nothing.

        It does not wait for a run in progress, so that a server may refuse a request at once. What
        hangs on the schedule or on several arguments together, a call checks when its turn comes.

        Args:
            prompt: As in `__call__`, as are the others.
            patch_policy: See there.
            guidance_interval: See there.
            step_cache: See there.
            arguments: See there.

        Returns:
            The pipeline's arguments with the artifact's defaults, and the request.

        Raises:
            ShapeError, ValueError, TypeError, UnsupportedModelError: As `__call__`.
        """
        if self.pipeline is None:
            raise UnsupportedModelError(
                "this engine was compiled from a bare transformer; call engine.denoise(latents, "
                "...), or compile the whole pipeline"
            )
        given = check_call(self._compiled, self.pipeline, self._artifact, prompt, arguments)
        request = read_request(
            self._artifact.manifest,
            lambda: requested_steps(self.pipeline, given),
            given,
            patch_policy=patch_policy,
            step_cache=step_cache,
            guidance_interval=guidance_interval,
            batched_guidance=self.batched_guidance,
        )
        return given, request

    @shielded()
    def denoise(
        self,
        latents: Tensor,
        *,
        scheduler: Any = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        patch_policy: PolicyChoice | None = None,
        step_cache: StepCache | str | None = None,
        callback: StepCallback | None = None,
        guidance_interval: tuple[float, float] = WHOLE_RUN,
        **conditioning: Tensor | None,
    ) -> Tensor:
        """Runs the denoising loop alone.

        Args:
            latents: Initial noise, `[B, C, H, W]`, for videos `[B, C, F, H, W]`; never packed, as
                FLUX's pipeline has them.
            scheduler: A diffusers flow scheduler, copied for the run; by default the pipeline's,
                or `FlowMatchEulerDiscreteScheduler()` for a bare transformer.
            num_inference_steps: Steps N; by default as many as `sigmas`, else 50.
            sigmas: Noise levels of the steps, before the scheduler's own shift: falling, from 1 at
                most to 1e-6 at least.
            patch_policy: As in `__call__`.
            step_cache: As in `__call__`.
            callback: Called after every step with its index and the latents, float32, which the
                scheduler made; it may edit them in place, or return others of the same shape to
                go on from. The copied scheduler then takes its steps itself, so that this means
                what it means in a diffusers pipeline, correctors included. Nothing else of the
                run may be changed.
            guidance_interval: As in `__call__`.
            conditioning: The transformer's own arguments: for FLUX `encoder_hidden_states`
                `[B, T, D]`, `pooled_projections` `[B, P]`, `guidance` `[B]`; for Wan
                `encoder_hidden_states`. For classifier-free guidance the same with `negative_`
                before the name (of text and pooled text), and the scale `[]`: `true_cfg_scale`
                for FLUX, `guidance_scale` for Wan, `[2]` with one for each expert.

        Returns:
            Clean latents, of the same shape, float32.

        Raises:
            ValueError, TypeError: Missing, unknown or misshapen conditioning, latents that are not
                finite, a value that is none for its name, or a step cache without a fit for this
                model.
            ShapeError, RunCancelled: As in `__call__`.
        """
        model = self._compiled.steps
        check_latents(latents, model)
        model.family.check_conditioning(model.transformer, latents.shape[0], conditioning)
        model.family.check_sizes(tuple(latents.shape), conditioning)
        given = {name: value for name, value in conditioning.items() if value is not None}
        steps, sigmas = check_schedule(num_inference_steps, sigmas)
        check_callback("callback", callback)
        with self._lock, observed("denoise", self._loop) as asked:
            self._check_state()
            scheduler = copy.deepcopy(check_scheduler(scheduler, self.pipeline))
            request = read_request(
                self._artifact.manifest,
                lambda: (steps, sigmas is not None),
                {},
                patch_policy=patch_policy,
                step_cache=step_cache,
                guidance_interval=guidance_interval,
                batched_guidance=self.batched_guidance,
            )
            asked(request)
            height, width = latents.shape[-2:]
            grid = model.grid(height, width, frames=latent_frames(latents.shape))
            steps = request.num_inference_steps or steps
            model.family.set_timesteps(scheduler, steps, request.sigmas or sigmas, grid)
            latents = latents.to(model.device, torch.float32, non_blocking=True)
            return self._driver().denoise(request, latents, scheduler, given, callback)

    @shielded()
    def plan_call(self, request: Request, **arguments: Any) -> tuple[RunPlan, Tensor]:
        """Plans a call of the pipeline, for whoever runs its buckets themselves.

        Args:
            request: What the run is asked to do.
            arguments: Arguments of the pipeline's `__call__`.

        Returns:
            The plan and z_0; nothing has run.

        Raises:
            UnsupportedModelError: Only the pipeline's own loop can take the model's steps.
        """
        with self._lock:
            self._check_state()
            plan, latents = self._driver().plan(request, self._with_defaults(arguments))
            return plan, latents.to(self._device, torch.float32)

    @shielded()
    def encode(self, **arguments: Any) -> tuple[Tensor, dict[str, Any]]:
        """Runs a call of the pipeline up to its first step, for whoever goes on with `denoise`.

        Args:
            arguments: Arguments of the pipeline's `__call__`.

        Returns:
            z_0, and the conditioning; both as `denoise` takes them.
        """
        with self._lock:
            self._check_state()
            _, found = self._driver().set_up(self._with_defaults(arguments))
            return found[:2]

    def _with_defaults(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._artifact.manifest.pipeline_defaults, **arguments}

    def cancel(self) -> None:
        """Ends the current run between two steps; its caller gets `RunCancelled`.

        Safe to call from another thread. Without a run in progress it does nothing.
        """
        self._loop.cancel()

    def save(self, path: str | Path) -> Path:
        """Writes the artifact to a folder, whole or not at all.

        Args:
            path: Where to; by custom it ends in `.ddit`. An artifact already there is replaced.

        Returns:
            The path.

        Raises:
            ArtifactError: Something else than an artifact is there, or nothing was compiled.
            TypeError, ValueError: No path.
        """
        return self.artifact.save(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Writes the artifact to the Hugging Face Hub; `ddit_rt.load(repo_id, model)` reads it.

        It holds no weights of the model. Pushing makes nobody trust it, nor this user; see `load`.

        Args:
            repo_id: `org/name`; it is made where it is not there. Of an artifact that is there,
                nothing stays.
            revision: The branch; by default the main one.
            token: Of a user who may write there; by default the one that is logged in.
            private: Whether a repository that is made is private; by default as its owner has set.
            commit_message: Of the one commit.

        Returns:
            URL of the commit.

        Raises:
            ArtifactError: Nothing was compiled.
            OSError, ValueError: The Hub's client refuses: no such user, no right to write, no name.
        """
        from ddit_rt.artifact.hub import push  # its client is slow to import, and seldom needed

        return push(
            self.artifact,
            repo_id,
            revision=revision,
            token=token,
            private=private,
            commit_message=commit_message,
        )

    def _check_state(self) -> None:
        """Refuses a call from within a run, and a model that is not what was compiled."""
        self._loop.check_alone()
        self._compiled.check_live(self._device)

    def _driver(self) -> Driver:
        """What drives a run of the model as it is now."""
        return Driver(
            pipeline=self.pipeline,
            compiled=self._compiled,
            loop=self._loop,
            solver=self._solver,
            fits=self._artifact.manifest.cache_fits,
        )
