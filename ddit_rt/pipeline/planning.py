"""From a compiled model and one request to a `RunPlan`: all that is fixed before the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ddit_rt.adapters import AdapterSet, adapter_bucket
from ddit_rt.artifact import TokenRanges
from ddit_rt.buckets import (
    Bucket,
    Detail,
    FineBucket,
    RunContext,
    Runners,
    Signal,
    SnrBucket,
    StepModel,
    UnguidedBucket,
    latent_frames,
)
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.executor import CachePlan, RunPlan
from ddit_rt.patch_scheduler import PatchPolicy, PolicyTable, Schedule, patch_name
from ddit_rt.pipeline.caching import resolve_cache
from ddit_rt.pipeline.guidance import WHOLE_RUN, guided_steps, scales_of
from ddit_rt.pipeline.live import LiveModel
from ddit_rt.pipeline.prompt import RunPrompt
from ddit_rt.pipeline.stages import Stage, computed_at_changes, fine_at_switches, stages_of
from ddit_rt.solver import SolverTable
from ddit_rt.step_cache import CacheFit, NoCache, ResolvedCache, StepCache

_NO_CACHE = NoCache()
_CAPACITY = 64
"""Rows of the tables of a captured run come in multiples of this."""


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """A transformer with its blocks ready to run, for every patch size.

    Attributes:
        steps: The unmodified model.
        multiples: Patch sizes that were asked for, as multiples of p, ascending, 1 first.
        ranges: Batch sizes and token counts that the compiled blocks accept.
        adapters: Trained adapters; a coarse size without one runs training-free.
        adapter_runners: Blocks with LoRA, by multiple, for every adapter.
        experts: Models of the same class and size that take over in later steps; in order.
        live: What the models were when the engine was made; None without an engine.
    """

    steps: StepModel
    multiples: tuple[int, ...]
    ranges: TokenRanges
    adapters: AdapterSet = field(default_factory=AdapterSet)
    adapter_runners: Mapping[int, Runners] = field(default_factory=dict)
    experts: tuple[StepModel, ...] = ()
    live: LiveModel | None = None

    @property
    def models(self) -> tuple[StepModel, ...]:
        """All of them."""
        return (self.steps, *self.experts)

    def offered(
        self, height: int, width: int, frames: int = 0
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Patch sizes that a latent of `height` x `width` offers, and why others are not.

        Raises:
            ShapeError: Not even p divides the latent, or its tokens are out of range.
        """
        offered, notes = [], []
        for multiple in self.multiples:
            problem = self._problem(height, width, frames, multiple)
            if problem is None:
                offered.append(multiple)
            elif multiple == 1:
                raise ShapeError(f"cannot run a latent of {height} x {width}: {problem}")
            else:
                notes.append(f"{patch_name(multiple)} is not offered at this size: {problem}")
        return tuple(offered), tuple(notes)

    def _problem(self, height: int, width: int, frames: int, multiple: int) -> str | None:
        patch = self.steps.patch_size * multiple
        if height % patch or width % patch:
            return f"patches of {patch} latent pixels do not divide {height} x {width}"
        tokens = self.steps.grid(height, width, multiple, frames).tokens
        low, high = self.ranges.image
        if not low <= tokens <= high:
            return f"{tokens} image tokens are outside the compiled range {low} to {high}"
        return None

    def rebind(self) -> bool:
        """Binds runners again whose weights the model has moved; whether there were any."""
        moved = False
        bases = (model.base for model in self.models)
        for runners in (*bases, *self.adapter_runners.values()):
            for blocks in runners.values():
                for runner in blocks:
                    if runner.stale():
                        runner.rebind()
                        moved = True
        return moved

    def check_sizes(self, batch: int, text_tokens: int) -> None:
        """Refuses a batch or a text length that the compiled blocks were not built for."""
        for name, count, (low, high) in (
            ("batch size", batch, self.ranges.batch),
            ("text length", text_tokens, self.ranges.text),
        ):
            if not low <= count <= high:
                raise ShapeError(
                    f"got a {name} of {count}; the compiled range is {low} to {high}. Compile "
                    "again with a wider range, or split the request"
                )


def plan_run(
    compiled: CompiledModel,
    *,
    shape: tuple[int, ...],
    conditioning: Mapping[str, Tensor],
    timesteps: Tensor,
    solver: SolverTable,
    policy: PatchPolicy,
    batched_guidance: bool = True,
    guidance_interval: tuple[float, float] = WHOLE_RUN,
    step_cache: StepCache = _NO_CACHE,
    fits: Sequence[CacheFit] = (),
    experts: Sequence[int] = (),
) -> tuple[RunPlan, RunPrompt]:
    """Resolves the policy for this shape and schedule and builds the buckets it can reach.

    Args:
        compiled: The model.
        shape: Latent shape `[B, C, H, W]` or `[B, C, F, H, W]`.
        conditioning: Checked conditioning tensors.
        timesteps: t that the model is given at each step, `[N]`.
        solver: Solver table.
        policy: Patch policy.
        batched_guidance: Whether the halves of classifier-free guidance run as one batch.
        guidance_interval: Where the run is guided, as shares of its steps.
        step_cache: Which steps reuse instead of compute.
        fits: Fits of step caches for this model, beside published ones.
        experts: Which of the models each step runs, `[N]`; by default the first.

    Returns:
        The plan, and the prompt in it, which a callback may change.

    Raises:
        ShapeError: The shape, or a size that the policy forces, cannot be run.
        ValueError: The policy cannot judge the steps of this solver, the interval is none, or the
            step cache has no fit for this model.
        UnsupportedModelError: A step cache for several experts.
    """
    height, width, frames = *shape[-2:], latent_frames(shape)
    model, experts = compiled.steps, experts or (0,) * len(timesteps)
    on_cuda = model.device.type == "cuda"
    offered, notes = compiled.offered(height, width, frames)
    table = policy.resolve(Schedule(sigmas=solver.sigmas, offered=offered))
    _refuse_scores_of_repeated_levels(table, solver, policy)
    table = fine_at_switches(table, experts)
    guidance = model.family.guidance(conditioning)
    stages, stage_of = stages_of(experts, guided_steps(guidance, guidance_interval, table.steps))
    _refuse_cache_of_experts(compiled, step_cache)
    cache = resolve_cache(step_cache, model, timesteps, fits)
    if cache is not None:
        cache = computed_at_changes(cache, stage_of)
    prompt = RunPrompt.of(compiled.models, conditioning, batched=batched_guidance)
    for one in prompt.passes[0]:
        compiled.check_sizes(len(one.text), one.text.shape[1])
    # One capture serves many step counts, and policies of any order of sizes.
    capacity = -(-table.steps // _CAPACITY) * _CAPACITY if on_cuda else table.steps
    keeps_detail = _keeps_detail(compiled, offered) and (on_cuda or table.coarse_after_fine())
    scales = scales_of(guidance, experts, len(compiled.models))
    if scales is not None:
        scales = _table(scales, capacity, model.device)
    context = RunContext(
        passes=prompt.passes[0],
        height=height,
        width=width,
        frames=frames,
        sigmas=_table(torch.tensor(solver.sigmas[:-1]), capacity, model.device),
        timesteps=_table(timesteps, capacity, model.device),
        detail=Detail(shape, model.device) if keeps_detail else None,
        scales=scales,
        keeps_residual=cache is not None,
    )
    contexts = [replace(context, passes=passes) for passes in prompt.passes]
    reachable = table.reachable()
    own = [
        [
            _bucket(compiled, one, own_context, multiple) if index in reachable else None
            for index, multiple in enumerate(offered)
        ]
        for one, own_context in zip(compiled.models, contexts, strict=True)
    ]
    plan = RunPlan(
        buckets=[_stage_buckets(own[stage.expert], stage) for stage in stages],
        stages=stage_of,
        stage_names=tuple(stage.name for stage in stages),
        offered=offered,
        policy=table,
        solver=solver,
        patch_size=model.patch_size,
        capacity=capacity,
        shared=_distinct(tensor for one in contexts for tensor in one.tensors()),
        weights=_unwatched_weights(compiled.models) if on_cuda else (),
        cache=_cache_plan(cache, model, context),
        notes=notes,
    )
    return plan, prompt


def _refuse_scores_of_repeated_levels(
    table: PolicyTable, solver: SolverTable, policy: PatchPolicy
) -> None:
    """Differences of latents say nothing where predicted and corrected ones take turns."""
    levels = solver.sigmas[:-1]
    if len(levels) > len(set(levels)) and any(map(table.scored, range(table.steps))):
        raise ValueError(
            f"{solver.source} visits each noise level twice, and {type(policy).__name__} compares "
            "the latents of successive levels; pass patch_policy=FinePolicy() or a StaticPolicy, "
            "or use another scheduler"
        )


def _refuse_cache_of_experts(compiled: CompiledModel, step_cache: StepCache) -> None:
    """What is fitted for one model says nothing of a run that changes models."""
    if compiled.experts and not isinstance(step_cache, NoCache):
        raise UnsupportedModelError(
            f"got {type(step_cache).__name__} for a pipeline of {len(compiled.models)} experts; "
            "fits of step caches are for one model. Leave step_cache out"
        )


def _cache_plan(
    cache: ResolvedCache | None, model: StepModel, context: RunContext
) -> CachePlan | None:
    if cache is None:
        return None
    signal = Signal(model, context) if cache.table.coefficients else None
    return CachePlan(table=cache.table, signal=signal, note=cache.note)


def _table(values: Tensor, rows: int, device: torch.device) -> Tensor:
    """`[N]` to float32 `[rows]` on the device; rows beyond N, never read, repeat the last one."""
    padded = torch.cat((values, values[-1:].expand(rows - len(values))))
    return padded.to(device, torch.float32, non_blocking=True)


def _distinct(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Each once; experts share the tables of a run, but not its text."""
    return tuple({id(tensor): tensor for tensor in tensors}.values())


def _unwatched_weights(models: Sequence[StepModel]) -> tuple[int, ...]:
    """Addresses of the weights outside the blocks: runners watch only what they are bound to."""
    addresses = []
    for model in models:
        blocks = {block_type.path for block_type in model.family.block_types(model.transformer)}
        addresses += [
            parameter.data_ptr()
            for name, parameter in model.transformer.named_parameters()
            if name.partition(".")[0] not in blocks
        ]
    return tuple(addresses)


def _stage_buckets(own: Sequence[Bucket | None], stage: Stage) -> Sequence[Bucket | None]:
    """An expert's buckets, in a stage."""
    return [bucket and UnguidedBucket(bucket) for bucket in own] if stage.unguided else own


def _bucket(
    compiled: CompiledModel, model: StepModel, context: RunContext, multiple: int
) -> Bucket:
    if multiple == 1:
        return FineBucket(model, context)
    adapter = compiled.adapters.adapters.get(multiple)
    if adapter is None:
        return SnrBucket(model, context, multiple)
    return adapter_bucket(model, context, adapter, compiled.adapter_runners[multiple])


def _keeps_detail(compiled: CompiledModel, offered: tuple[int, ...]) -> bool:
    """Whether a coarse step may build on the training-free one, which keeps detail."""
    adapters = compiled.adapters.adapters
    return any(
        multiple not in adapters or adapters[multiple].config.variant == "snr"
        for multiple in offered[1:]
    )
