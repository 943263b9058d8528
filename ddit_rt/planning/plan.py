"""From a compiled model, an outline and a prompt to a `RunPlan`: what is fixed before the loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddit_rt.adapters import adapter_bucket
from ddit_rt.errors import ShapeError
from ddit_rt.loop import CachePlan, RunPlan
from ddit_rt.models.base import Guidance
from ddit_rt.models.family import Family
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.outline import Outline, stages_of
from ddit_rt.steps import (
    Bucket,
    Detail,
    FineBucket,
    FirstBlock,
    FirstBlockSignal,
    InputSignal,
    LatentSignal,
    MixedBucket,
    Pass,
    RunContext,
    Signal,
    SnrBucket,
    StepModel,
    latent_frames,
)

_CAPACITY = 64
"""Rows of the tables of a captured run come in multiples of this."""

Groups = Sequence[Sequence[Mapping[str, Tensor]]]
"""Conditioning of every pass; the passes of a group run as one, and are joined by guidance."""


def plan_run(
    compiled: CompiledModel,
    outline: Outline,
    conditioning: Mapping[str, Tensor],
) -> RunPlan:
    """The plan of a run that joins the cond and uncond passes itself.

    Args:
        compiled: The model.
        outline: The run.
        conditioning: Checked conditioning tensors.

    Raises:
        ShapeError: A batch or text length that the compiled blocks were not built for.
    """
    family = compiled.steps.family
    guidance = family.guidance(conditioning)
    parts = passes_of(family, conditioning, guidance, outline.batched_guidance)
    if guidance is not None and outline.batched_guidance and len(parts) > 1:
        note = "the passes of guidance run one after the other: their prompts are not of one shape"
        outline = replace(outline, notes=(*outline.notes, note))
    scales = scales_of(guidance, outline.experts, len(compiled.models))
    contexts = _contexts(compiled, outline, (parts,), scales, late=False)
    own = [_buckets(compiled, outline, model, context) for model, (context,) in contexts]
    stages, stage_of = stages_of(outline.experts, outline.guided)
    return _plan(
        compiled,
        outline,
        contexts,
        buckets=[own[stage.expert] for stage in stages],
        guided=tuple(not stage.unguided for stage in stages),
        stages=stage_of,
        stage_names=tuple(stage.name for stage in stages),
    )


def plan_passes(
    compiled: CompiledModel, outline: Outline, conditionings: Sequence[Mapping[str, Tensor]]
) -> RunPlan:
    """The plan of a run whose passes are asked for one by one, and joined by who asks.

    Args:
        compiled: The model.
        outline: The run.
        conditionings: Conditioning of every pass of a step, that with the prompt first.

    Returns:
        A plan with a stage for every pass of every model: stage `e * P + i` is pass i of model e.

    Raises:
        ShapeError: A batch or text length that the compiled blocks were not built for.
    """
    contexts = _contexts(compiled, outline, [(one,) for one in conditionings], None, late=True)
    names = [
        [f"expert {expert + 1}"] * (expert > 0) + _pass_name(place)
        for expert, place in itertools.product(range(len(contexts)), range(len(conditionings)))
    ]
    return _plan(
        compiled,
        outline,
        contexts,
        buckets=[
            _buckets(compiled, outline, model, context)
            for model, own in contexts
            for context in own
        ],
        stages=(0,) * outline.steps,
        stage_names=tuple(", ".join(parts) for parts in names),
    )


def _pass_name(place: int) -> list[str]:
    """Of a pass beside that with the prompt."""
    return [] if place == 0 else ["negative prompt"] if place == 1 else [f"pass {place + 1}"]


Contexts = Sequence[tuple[StepModel, Sequence[RunContext]]]
"""Every model with a context for each group of passes."""


def _contexts(
    compiled: CompiledModel,
    outline: Outline,
    groups: Groups,
    scales: Tensor | None,
    *,
    late: bool,
) -> Contexts:
    model, shape = compiled.steps, outline.shape
    device, capacity = model.device, _capacity(outline, model)
    mixed = outline.policy.fine_share > 0
    keeps_detail = _keeps_detail(compiled, outline.offered) and (
        device.type == "cuda" or mixed or outline.policy.coarse_after_fine()
    )
    context = RunContext(
        passes=(),
        height=shape[-2],
        width=shape[-1],
        frames=latent_frames(shape),
        sigmas=_table(outline.solver.levels(), capacity, device),
        timesteps=_table(outline.timesteps, capacity, device),
        detail=None,
        scales=None if scales is None else _table(scales, capacity, device),
        residuals=0 if outline.cache is None else 1 + outline.cache.residual_order,
        steps=outline.steps,
        unguided=scales is not None and not all(outline.guided),
        late=late,
    )
    first_block = outline.cache is not None and outline.cache.first_block
    details = [Detail(shape, device, mixed=mixed) if keeps_detail else None for _ in groups]
    contexts = [
        (
            one,
            [
                replace(
                    context,
                    passes=tuple(Pass.of(one, part) for part in group),
                    detail=detail,
                    first_blocks=tuple(FirstBlock() for _ in group) if first_block else (),
                )
                for group, detail in zip(groups, details, strict=True)
            ],
        )
        for one in compiled.models
    ]
    for one in contexts[0][1]:
        for part in one.passes:
            compiled.check_batch(len(part.text))
            compiled.check_text(part.text.shape[1])
            grid = model.grid(context.height, context.width, frames=context.frames)
            more = model.family.more_tokens(part.conditioning)
            compiled.check_image(grid.tokens + more)
    return contexts


def _plan(
    compiled: CompiledModel,
    outline: Outline,
    contexts: Contexts,
    *,
    buckets: Sequence[Sequence[Bucket | None]],
    **stages: Any,
) -> RunPlan:
    model, on_cuda = compiled.steps, compiled.steps.device.type == "cuda"
    every = [context for _, own in contexts for context in own]
    cache = _cache_plan(outline, *contexts[0], [own[0] for own in buckets])
    return RunPlan(
        buckets=buckets,
        offered=outline.offered,
        policy=outline.policy,
        solver=outline.solver,
        patch_size=model.patch_size,
        capacity=_capacity(outline, model),
        shared=_distinct(tensor for context in every for tensor in context.tensors()),
        fixed=tuple(_fixed(part.conditioning) for context in every for part in context.passes),
        weights=_unwatched_weights(compiled.models) if on_cuda else (),
        cache=cache,
        notes=outline.notes,
        **stages,
    )


def _capacity(outline: Outline, model: StepModel) -> int:
    """One capture serves many step counts, and policies of any order of sizes."""
    steps = outline.steps
    return -(-steps // _CAPACITY) * _CAPACITY if model.device.type == "cuda" else steps


def _buckets(
    compiled: CompiledModel, outline: Outline, model: StepModel, context: RunContext
) -> list[Bucket | None]:
    """Those that the policy can reach."""
    reachable, fine_share = outline.policy.reachable(), outline.policy.fine_share
    return [
        _bucket(compiled, model, context, multiple, fine_share) if index in reachable else None
        for index, multiple in enumerate(outline.offered)
    ]


def _cache_plan(
    outline: Outline,
    model: StepModel,
    contexts: Sequence[RunContext],
    fine: Sequence[Bucket | None],
) -> CachePlan | None:
    """`fine`: buckets at p, the first of which are the contexts' own."""
    cache = outline.cache
    if cache is None:
        return None
    signal: Signal | None = None
    if cache.power_exp is not None:
        signal = LatentSignal(outline.shape, contexts[0].sigmas, cache.power_exp)
    elif cache.first_block:
        own = zip(contexts, fine, strict=False)
        signal = FirstBlockSignal(
            [
                bucket if isinstance(bucket, FineBucket) else FineBucket(model, context)
                for context, bucket in own
            ],
            [one for context in contexts for one in context.first_blocks],
            torch.zeros(outline.shape, device=model.device, dtype=torch.float32),
        )
    elif cache.coefficients:
        passes = tuple(one for context in contexts for one in context.passes)
        signal = InputSignal(model, replace(contexts[0], passes=passes))
    return CachePlan(table=cache, signal=signal)


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


def _bucket(
    compiled: CompiledModel,
    model: StepModel,
    context: RunContext,
    multiple: int,
    fine_share: float,
) -> Bucket:
    if multiple == 1:
        return FineBucket(model, context)
    if fine_share:
        return MixedBucket(model, context, multiple, fine_share)
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


def scales_of(guidance: Guidance | None, experts: Sequence[int], count: int) -> Tensor | None:
    """Guidance scale of every step, `[N]`, float32; None without guidance.

    Args:
        guidance: The run's.
        experts: Expert of every step, `[N]`.
        count: Experts that there are.

    Raises:
        ShapeError: Another number of scales.
    """
    if guidance is None:
        return None
    scales = guidance.scale
    if scales.ndim == 1 and len(scales) != count:
        raise ShapeError(
            f"got {len(scales)} guidance scales for {count} model(s); give one for all, without "
            "dimensions, or one for each"
        )
    scales = scales.expand(count)
    index = torch.tensor(experts, dtype=torch.int64, device="cpu").to(
        scales.device, non_blocking=True
    )
    return scales.index_select(0, index)


def _fixed(conditioning: Mapping[str, Any]) -> str:
    """Plain values among a pass's conditioning."""
    return repr([item for item in conditioning.items() if not isinstance(item[1], Tensor)])


def passes_of(
    family: Family, conditioning: Mapping[str, Any], guidance: Guidance | None, batched: bool
) -> tuple[Mapping[str, Tensor], ...]:
    """Conditioning of every pass of the model in a step: two where one batch cannot hold both."""
    if guidance is None:
        return (conditioning,)
    if not batched:
        return guidance.prompt, guidance.negative
    return family.together(guidance) or (guidance.prompt, guidance.negative)
