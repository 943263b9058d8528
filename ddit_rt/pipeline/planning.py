"""From a compiled model and one request to a `RunPlan`: all that is fixed before the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddit_rt.adapters import AdapterSet, adapter_bucket
from ddit_rt.artifact import TokenRanges
from ddit_rt.buckets import (
    Bucket,
    Detail,
    FineBucket,
    Pass,
    RunContext,
    Runners,
    Signal,
    SnrBucket,
    StepModel,
    latent_frames,
)
from ddit_rt.errors import ShapeError
from ddit_rt.executor import CachePlan, RunPlan
from ddit_rt.patch_scheduler import PatchPolicy, PolicyTable, Schedule, patch_name
from ddit_rt.pipeline.caching import resolve_cache
from ddit_rt.pipeline.guidance import WHOLE_RUN, passes_of, scales_of
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
    """

    steps: StepModel
    multiples: tuple[int, ...]
    ranges: TokenRanges
    adapters: AdapterSet = field(default_factory=AdapterSet)
    adapter_runners: Mapping[int, Runners] = field(default_factory=dict)

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
        for runners in (self.steps.base, *self.adapter_runners.values()):
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

    Returns:
        The plan, and the prompt in it, which a callback may change.

    Raises:
        ShapeError: The shape, or a size that the policy forces, cannot be run.
        ValueError: The policy cannot judge the steps of this solver, the interval is none, or the
            step cache has no fit for this model.
    """
    height, width, frames = *shape[-2:], latent_frames(shape)
    model = compiled.steps
    on_cuda = model.device.type == "cuda"
    offered, notes = compiled.offered(height, width, frames)
    table = policy.resolve(Schedule(sigmas=solver.sigmas, offered=offered))
    _refuse_scores_of_repeated_levels(table, solver, policy)
    cache = resolve_cache(step_cache, model, timesteps, fits)
    guidance = model.family.guidance(conditioning)
    passes = tuple(
        Pass.of(model, one) for one in passes_of(conditioning, guidance, batched_guidance)
    )
    for one in passes:
        compiled.check_sizes(len(one.text), one.text.shape[1])
    # One capture serves many step counts, and policies of any order of sizes.
    capacity = -(-table.steps // _CAPACITY) * _CAPACITY if on_cuda else table.steps
    keeps_detail = _keeps_detail(compiled, offered) and (on_cuda or table.coarse_after_fine())
    scales = scales_of(guidance, guidance_interval, table.steps)
    if scales is not None:
        scales = _table(scales, capacity, model.device)
    context = RunContext(
        passes=passes,
        height=height,
        width=width,
        frames=frames,
        sigmas=_table(torch.tensor(solver.sigmas[:-1]), capacity, model.device),
        timesteps=_table(timesteps, capacity, model.device),
        detail=Detail(shape, model.device) if keeps_detail else None,
        scales=scales,
        keeps_residual=cache is not None,
    )
    reachable = table.reachable()
    buckets = [
        _bucket(compiled, context, multiple) if index in reachable else None
        for index, multiple in enumerate(offered)
    ]
    plan = RunPlan(
        buckets=buckets,
        offered=offered,
        policy=table,
        solver=solver,
        patch_size=model.patch_size,
        capacity=capacity,
        shared=context.tensors(),
        weights=_unwatched_weights(model) if on_cuda else (),
        cache=_cache_plan(cache, model, context),
        notes=notes,
    )
    return plan, RunPrompt(model=model, conditioning=conditioning, passes=passes)


@dataclass(frozen=True, kw_only=True)
class RunPrompt:
    """The prompt of a run, where its buckets read it.

    Attributes:
        model: The model.
        conditioning: As `plan_run` was given it.
        passes: Of the model, in a step.
    """

    model: StepModel
    conditioning: Mapping[str, Tensor]
    passes: tuple[Pass, ...]

    def rewrite(self, changes: Mapping[str, Tensor]) -> None:
        """Gives the steps to come other conditioning tensors, by name; only the text may change."""
        conditioning = {**self.conditioning, **changes}
        guidance, batched = self.model.family.guidance(conditioning), len(self.passes) == 1
        passes = passes_of(conditioning, guidance, batched)
        for one, changed in zip(self.passes, passes, strict=True):
            one.text.copy_(Pass.of(self.model, changed).text)


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


def _unwatched_weights(model: StepModel) -> tuple[int, ...]:
    """Addresses of the weights outside the blocks: runners watch only what they are bound to."""
    blocks = {block_type.path for block_type in model.family.block_types(model.transformer)}
    own = [parameter.data_ptr() for parameter in model.transformer.parameters(recurse=False)]
    return (
        *own,
        *(
            parameter.data_ptr()
            for name, child in model.transformer.named_children()
            if name not in blocks
            for parameter in child.parameters()
        ),
    )


def _bucket(compiled: CompiledModel, context: RunContext, multiple: int) -> Bucket:
    if multiple == 1:
        return FineBucket(compiled.steps, context)
    adapter = compiled.adapters.adapters.get(multiple)
    if adapter is None:
        return SnrBucket(compiled.steps, context, multiple)
    return adapter_bucket(compiled.steps, context, adapter, compiled.adapter_runners[multiple])


def _keeps_detail(compiled: CompiledModel, offered: tuple[int, ...]) -> bool:
    """Whether a coarse step may build on the training-free one, which keeps detail."""
    adapters = compiled.adapters.adapters
    return any(
        multiple not in adapters or adapters[multiple].config.variant == "snr"
        for multiple in offered[1:]
    )
