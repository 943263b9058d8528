"""Section `buckets`: one step at each patch size, and one without a model, against its floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from bench_overhead import null_plan
from diffusers import FlowMatchEulerDiscreteScheduler
from real_models import Case
from real_setup import Setup
from records import Save, unsaved
from timing import Call, Measured, release, spread, take_turns

from ddit_rt.engine.cost import StepCost
from ddit_rt.loop import CpuExecutor, CudaExecutor, Executor, RunTrace, TorchGraphs
from ddit_rt.policies import DDiTPolicy, StaticPolicy

_STEPS = 8
_WARM_UP_STEPS = 3  # they have no third difference to score, either
_FP32 = 4


def buckets(setup: Setup, case: Case, save: Save = unsaved) -> dict[str, Any]:
    """Steps of every patch size that the case offers, in turns, and of images one without a model.

    A run takes one step at p and then the size in question: the first step pays for what later
    ones find in caches, and with it coarse steps correct themselves as they do in use. Times are
    those of the trace, decision, model and solver together.
    """
    costs, limits = setup.costs(case), setup.rates
    floors = {patch: step_floor(setup, cost) for patch, cost in costs.items()}
    builders = {patch: partial(bucket_steps, setup, case, patch) for patch in costs}
    if not case.num_frames:
        floors["skip"] = skip_floor(setup, case)
        builders["skip"] = partial(skip_steps, setup, case)
    release()
    setup.engine_error()  # compiled before, not inside, the warm-up of a method

    def record(measured: Mapping[str, Measured]) -> dict[str, Any]:
        rows = {name: _row(own, floors[name]) for name, own in measured.items()}
        engine = {"backend": setup.blocks, "engine": setup.engine_times}
        return {"rates": limits, **engine, "rows": rows}

    return record(
        take_turns(
            builders,
            repeats=setup.repeats,
            device=setup.device,
            deadline=setup.deadline,
            warm_up_limit=setup.warm_up_limit,
            on_news=lambda measured: save(record(measured)),
        )
    )


def _row(own: Measured, floor: dict[str, Any]) -> dict[str, Any]:
    if own.error is not None or not own.results:
        return {"error": own.error or "no round was run"}
    return {
        **step_row(own.results, floor),
        "provisional": own.provisional,
        "first_call_seconds": own.first_call_seconds,
    }


def step_row(traces: Sequence[RunTrace], floor: dict[str, Any]) -> dict[str, Any]:
    """The entry of one kind of step, from the traces of its runs."""
    timed = [record for trace in traces for record in trace.steps[_WARM_UP_STEPS:]]
    seconds = spread([record.latency_ms * 1e-3 for record in timed])
    return {
        "seconds": seconds,
        **floor,
        "over_floor": seconds["median"] / floor["floor_seconds"],
        "ran_on": traces[-1].executor,
        "notes": list(traces[-1].notes),
    }


def step_floor(setup: Setup, cost: StepCost) -> dict[str, Any]:
    """The least time of a step: its operations, or its weights where reading them takes longer."""
    compute = cost.flops / setup.rates["matrix_flops_per_second"]
    weights = cost.weight_bytes / setup.rates["copy_bytes_per_second"]
    return {
        "flops": cost.flops,
        "weight_bytes": cost.weight_bytes,
        "floor_seconds": max(compute, weights),
        "bound": "operations" if compute >= weights else "weights",
    }


def skip_floor(setup: Setup, case: Case) -> dict[str, Any]:
    """The least time of decision and update: bytes that they must read and write, once.

    The latest three latents in fp32 and the velocity in, the next latents out; the difference that
    is scored can be formed on the way, and its moments are few.
    """
    height, width = case.latent
    channels = setup.pipeline.transformer.config.in_channels // 4
    values = case.batch * channels * height * width
    moved = values * (3 * _FP32 + setup.dtype.itemsize + _FP32)
    return {
        "moved_bytes": moved,
        "floor_seconds": moved / setup.rates["copy_bytes_per_second"],
        "bound": "bytes",
    }


def bucket_steps(setup: Setup, case: Case, patch: str) -> Call:
    """A call that returns the trace of steps at one patch size, after a first one at p."""
    setup.need_engine()
    arguments = {**setup.request(case), "num_inference_steps": _STEPS}
    policy = StaticPolicy(["p"] + [patch] * (_STEPS - 1))

    def run() -> RunTrace | None:
        setup.generate(arguments, policy, setup.form)
        return setup.engine.last_trace

    return run


def skip_steps(setup: Setup, case: Case) -> Call:
    """A call that returns the trace of steps whose model costs nothing.

    What is left of a step is its decision and its update; on CUDA also the copy of the velocity to
    where the update reads it.
    """
    channels = setup.pipeline.transformer.config.in_channels // 4
    shape = (case.batch, channels, *case.latent)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(shape, generator=generator).to(setup.device)
    velocity = torch.randn(shape, generator=generator).to(setup.device, setup.dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(_STEPS)
    policy = DDiTPolicy(refresh=None, fine_tail=0)
    plan = null_plan(scheduler, velocity, policy)
    executor: Executor = (
        CudaExecutor(TorchGraphs(setup.device), setup.form)
        if setup.device.type == "cuda"
        else CpuExecutor()
    )
    return lambda: executor.run(plan, latents)[1]
