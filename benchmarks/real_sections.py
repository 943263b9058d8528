"""The other sections of `bench_real_size.py`: `buckets`, `blocks`, `kernels` and `compile`."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_overhead import null_plan
from diffusers import FlowMatchEulerDiscreteScheduler
from ops_cuda import capture, microseconds
from real_models import Case
from real_setup import PATCHES, Setup, captures_of, use_executor
from records import Save
from timing import Call, Measured, attempt, release, spread, synchronize, timed
from torch import Tensor

import ddit_rt
from ddit_rt.engine.cost import StepCost
from ddit_rt.lab.profile.events import (
    Event,
    device_ranges,
    host_calls,
    own_seconds,
    profile,
    range_span,
    ranges_of,
    work_span,
)
from ddit_rt.loop import CpuExecutor, CudaExecutor, Executor, RunTrace, TorchGraphs
from ddit_rt.models.base import BATCH, IMAGE, JOINT, TEXT, BlockType
from ddit_rt.models.layered import LayeredFamily
from ddit_rt.policies import DDiTPolicy, StaticPolicy, parse_patch

_BUCKET_STEPS, _PROFILED_STEPS = 8, 4
_WARM_UP_STEPS = 3  # they have no third difference to score, either
_FP32 = 4
_REPEATS, _REPLAYS = 12, 5
_MOST_KERNELS = {"blocks": 16, "kernels": 40}
_PROFILED = ("p", "4p")
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def buckets(setup: Setup, case: Case, save: Save) -> dict[str, Any]:
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
        rows = {name: _bucket_row(own, floors[name]) for name, own in measured.items()}
        engine = {"backend": setup.blocks, "engine": setup.engine_times}
        return {"rates": limits, **engine, "rows": rows}

    return setup.in_turns(builders, record, save)


def _bucket_row(own: Measured, floor: dict[str, Any]) -> dict[str, Any]:
    """The entry of one kind of step, from the traces of its runs."""
    if own.error is not None or not own.results:
        return {"error": own.error or "no round was run"}
    traces: list[RunTrace] = own.results
    timed = [record for trace in traces for record in trace.steps[_WARM_UP_STEPS:]]
    seconds = spread([record.latency_ms * 1e-3 for record in timed])
    return {
        "seconds": seconds,
        **floor,
        "over_floor": seconds["median"] / floor["floor_seconds"],
        "ran_on": traces[-1].executor,
        "notes": list(traces[-1].notes),
        "provisional": own.provisional,
        "first_call_seconds": own.first_call_seconds,
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
    moved = values * (3 * _FP32 + setup.args.dtype.itemsize + _FP32)
    return {
        "moved_bytes": moved,
        "floor_seconds": moved / setup.rates["copy_bytes_per_second"],
        "bound": "bytes",
    }


def bucket_steps(setup: Setup, case: Case, patch: str) -> Call:
    """A call that returns the trace of steps at one patch size, after a first one at p."""
    setup.need_engine()
    return _run(setup, case, ["p"] + [patch] * (_BUCKET_STEPS - 1), setup.form)


def skip_steps(setup: Setup, case: Case) -> Call:
    """A call that returns the trace of steps whose model costs nothing.

    What is left of a step is its decision and its update; on CUDA also the copy of the velocity to
    where the update reads it.
    """
    channels = setup.pipeline.transformer.config.in_channels // 4
    shape = (case.batch, channels, *case.latent)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(shape, generator=generator).to(setup.device)
    velocity = torch.randn(shape, generator=generator).to(setup.device, setup.args.dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(_BUCKET_STEPS)
    policy = DDiTPolicy(refresh=None, fine_tail=0)
    plan = null_plan(scheduler, velocity, policy)
    executor: Executor = (
        CudaExecutor(TorchGraphs(setup.device), setup.form)
        if setup.device.type == "cuda"
        else CpuExecutor()
    )
    return lambda: executor.run(plan, latents)[1]


def blocks(setup: Setup, case: Case, save: Save) -> dict[str, Any]:
    """The first block of each class at every patch size, on random tokens.

    What a step costs is about the sum over its blocks, so this tells in seconds where time goes,
    with as few as one block of each class in the model.
    """
    setup.need_engine()
    model = setup.engine._compiled.steps  # noqa: SLF001 - no user needs it
    assert isinstance(model.family, LayeredFamily), "the presets have one"
    rows: dict[str, Any] = {}
    for block_type in model.family.block_types(model.transformer):
        for patch in setup.costs(case):
            row, problem = attempt(partial(_block_row, setup, case, block_type, patch))
            rows[f"{block_type.name} {patch}"] = row or {"error": problem}
            save({"rows": rows})
    return {"rows": rows}


def _block_row(setup: Setup, case: Case, block_type: BlockType, patch: str) -> dict[str, Any]:
    model = setup.engine._compiled.steps  # noqa: SLF001 - no user needs it
    block, runner = block_type.blocks(model.transformer)[0], model.base[block_type.path][0]
    inputs = _inputs(setup, case, block_type, patch)
    ours = _seconds(setup, lambda: runner(*inputs))
    with torch.no_grad():
        torchs = _seconds(setup, lambda: block_type.forward(block, *inputs))
        expected = block_type.forward(block, *inputs)
    found = runner(*inputs)
    errors = [
        (one.float() - other.float()).norm() / other.float().norm()
        for one, other in zip(found, expected, strict=True)
    ]
    row: dict[str, Any] = {
        "seconds": ours,
        "torch_seconds": torchs,
        "speedup": torchs / ours,
        "relative_error": max(float(error) for error in errors),
    }
    if setup.device.type == "cuda":
        row["kernels"] = _graph_kernels(lambda: runner(*inputs))
    return row


def _inputs(setup: Setup, case: Case, block_type: BlockType, patch: str) -> list[Tensor]:
    """Random, in the dtypes of the weights; what has no batch dimension, positions, in float32."""
    height, width = case.latent
    model = setup.engine._compiled.steps  # noqa: SLF001 - no user needs it
    grid = model.grid(height, width, parse_patch(patch), case.latent_frames)
    batch, text = setup.model.passes * case.batch, setup.preset.text_tokens
    sizes = {BATCH: batch, IMAGE: grid.tokens, TEXT: text, JOINT: grid.tokens + text}
    dtype = block_type.dtype(block_type.blocks(model.transformer)[0])
    return [
        torch.randn(
            spec.shape(sizes),
            device=setup.device,
            dtype=dtype if BATCH in spec.dims else torch.float32,
        )
        for spec in block_type.inputs
    ]


def _seconds(setup: Setup, call: Callable[[], Any]) -> float:
    """Median time of a call; on CUDA of replays of its graph, free of the host's launches."""
    if setup.device.type != "cuda":
        call()
        return statistics.median(timed(call, setup.device)[0] for _ in range(_REPEATS))
    graph, kept = capture([lambda: call])
    seconds = statistics.median(microseconds(graph, 1) * 1e-6 for _ in range(_REPEATS))
    del kept  # what the graph has written to lived until now
    return seconds


def _graph_kernels(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of a call, the longest first."""
    graph, kept = capture([lambda: call])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    del kept
    found = [
        {
            "name": event.key[:160],
            "count": event.count / _REPLAYS,
            "seconds": event.self_device_time_total * 1e-6 / _REPLAYS,
        }
        for event in profile.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])[: _MOST_KERNELS["blocks"]]


def kernels(setup: Setup, case: Case, save: Save) -> dict[str, Any]:
    """Runs of a few steps at p, and at 4p, under torch's profiler."""
    setup.need_engine()
    rows = {}
    for patch in _PROFILED:
        if patch in setup.costs(case):
            row, problem = attempt(partial(_kernels_row, setup, case, patch))
            rows[patch] = row or {"error": problem}
            save({"rows": rows})
    return {"rows": rows}


def _kernels_row(setup: Setup, case: Case, patch: str) -> dict[str, Any]:
    cuda, plan = setup.device.type == "cuda", [patch] * _PROFILED_STEPS
    observed = _run(setup, case, plan, "host" if cuda else "auto")
    trace = observed()  # captures
    events = annotated(setup, observed)
    row = {
        **kernel_table(events, f"ddit_rt/model/{patch}", cuda=cuda),
        "nodes": {
            name: count
            for report in captures_of(setup.engine)
            for name, count in report.nodes.items()
        },
    }
    if cuda:
        observed = _run(setup, case, plan, setup.form)
        trace = observed()
        row |= call_counts(annotated(setup, observed))
    return {**row, "ran_on": trace.executor}


def _run(setup: Setup, case: Case, plan: list[str], form: str) -> Callable[[], RunTrace]:
    """A run of a plan, which returns its trace."""
    arguments = {**setup.request(case), "num_inference_steps": len(plan)}

    def run() -> RunTrace:
        setup.generate(arguments, StaticPolicy(plan), form)
        assert setup.engine.last_trace is not None, "a run leaves a trace"
        return setup.engine.last_trace

    return run


def kernel_table(events: Sequence[Event], name: str, *, cuda: bool) -> dict[str, Any]:
    """What ran inside the ranges of a name, for a mean range, the longest first.

    Args:
        events: Of a run, by their start.
        name: Of the ranges, one a step.
        cuda: Whether kernels count; else the operators of torch, each without those it calls.

    Raises:
        RuntimeError: The profile shows no such range with work in it.
    """
    ranges = [event for event in ranges_of(events) if event.name == name]
    if cuda:
        ranges = device_ranges(events, ranges)
        timed = [(event, event.seconds) for event in events if event.category == "kernel"]
    else:
        timed = own_seconds([event for event in events if event.category == "cpu_op"])
    if not ranges:
        raise RuntimeError(f"the profile shows no range {name!r} with work in it")
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event, own in timed:
        if any(one.start <= event.start <= one.end for one in ranges):
            seconds[event.name] += own / len(ranges)
            counts[event.name] += 1
    total = sum(seconds.values())
    longest = sorted(seconds, key=seconds.__getitem__, reverse=True)
    return {
        "kernel_seconds": total,
        "kernel_count": sum(counts.values()) / len(ranges),
        "kernels": [
            {
                "name": kernel[:160],
                "count": counts[kernel] / len(ranges),
                "seconds": seconds[kernel],
                "share": seconds[kernel] / total,
            }
            for kernel in longest[: _MOST_KERNELS["kernels"]]
        ],
    }


def call_counts(events: Sequence[Event]) -> dict[str, Any]:
    """Calls of the host in the step loop, between the first and the last kernel, and in all.

    The kernels of the set-up come before the loop; and a profiler may not see all that runs inside
    a loop on the device, so that its last kernel seems to end early.
    """
    return {
        "host_calls_in_loop": host_calls(events, range_span(events, "ddit_rt/run")),
        "host_calls_during_work": host_calls(events, work_span(events)),
        "host_calls": host_calls(events),
    }


def annotated(setup: Setup, call: Call) -> list[Event]:
    """A profile in which our ranges can be seen."""
    engine: Any = setup.engine
    engine.annotate = True
    try:
        return profile(call, setup.device)
    finally:
        engine.annotate = False


def compiling(setup: Setup, case: Case, _: Save) -> dict[str, Any]:
    """Times to compile without any cache, to load, to capture, and from load to first image.

    The artifact is left for later calls where they look for one and there is none.
    """
    setup.forget_engine()
    record: dict[str, Any] = {}
    arguments = setup.request(case)
    # Every size that the case offers, coarse ones first; the rest at p.
    offered = [patch for patch in reversed(PATCHES) if patch in setup.costs(case)]
    policy = StaticPolicy(offered + ["p"] * (case.steps - len(offered)))
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as name, fresh_caches(Path(name)):
        folder = Path(name) / "model.ddit"
        engine, record["compile_seconds"] = _clocked(setup, setup.compiled)
        engine.save(folder)
        if not setup.artifact.exists():
            engine.save(setup.artifact)
        record["artifact_bytes"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        del engine
        release()
        started = time.perf_counter()
        engine, record["load_seconds"] = _clocked(
            setup, lambda: ddit_rt.load(folder, setup.pipeline, progress=False)
        )
        use_executor(engine, setup.form)
        first: Call = lambda: engine(**arguments, patch_policy=policy)  # noqa: E731
        _, record["first_run_seconds"] = _clocked(setup, first)
        record["load_to_first_image_seconds"] = time.perf_counter() - started
        _, record["second_run_seconds"] = _clocked(setup, first)
        record["captures"] = [asdict(report) for report in captures_of(engine)]
    return record


def fresh_caches(folder: Path) -> AbstractContextManager[Any]:
    """Empty caches of Inductor and Triton, so that a compilation is timed and not a look-up."""
    for name in _CACHES:
        (folder / name).mkdir()
    return mock.patch.dict(os.environ, {name: str(folder / name) for name in _CACHES})


def _clocked(setup: Setup, call: Call) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    synchronize(setup.device)
    return result, time.perf_counter() - started
