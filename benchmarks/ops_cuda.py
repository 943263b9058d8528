"""`bench_ops.py --device cuda`: the native ops against the time that their bytes take.

A kernel of some microseconds is shorter than its launch from Python, so launches are captured into
one CUDA graph, each with inputs and outputs of its own, and the graph is replayed. All buffers
together are several times the L2 cache, so that a large op reads and writes memory; an op of less
than a mebibyte is bound by the launch within the graph, which the copy beside it shows.

The step loop's own kernels are set up as in the middle of a run whose every step is scored: the
solver is Euler's, the difference the third, the sizes those of 2p and 4p.

The floor is bytes over bandwidth: each input read once and each output written once, over what a
copy of a gibibyte moves per second, reads and writes together, in the same run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from records import RESULTS, head, machine_entry, publish
from timing import Call, attempt, release, spread
from torch import Tensor

from ddit_rt import _runtime, ops
from ddit_rt.lab.profile.ceilings import copy_rate, cuda_events
from ddit_rt.loop import RunPlan
from ddit_rt.loop.buffers import LoopBuffers
from ddit_rt.policies import DYNAMIC, PolicyTable
from ddit_rt.solver import SolverTable

LATENTS: Mapping[str, tuple[int, ...]] = {
    "FLUX 1024": (1, 16, 128, 128),
    "Wan 480p": (1, 16, 21, 60, 104),
    "Wan 720p": (1, 16, 21, 90, 160),
    "Wan 704p": (1, 16, 21, 88, 160),
}
PATCH_SIZES = {"FLUX 1024": (2, 4, 8), "Wan 480p": (2, 4), "Wan 720p": (2,), "Wan 704p": (4, 8)}
"""Those that divide a latent, each once of Wan's larger ones."""
DTYPES = (torch.bfloat16, torch.float32)
_L2_MULTIPLE = 4
_MOST_LAUNCHES = 512
_FEWEST_LAUNCHES = 8
_REPLAYS = 10
_STEPS = 4096  # a decision is for the next step each time: enough for all replays of a graph
_FIRST = 4  # decisions before anything is timed, so that the loop has a history
_FP32 = 4
PATCH = 2
OFFERED = (1, 2, 4)
SIZES = ("FLUX 1024", "Wan 480p", "Wan 720p")


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One op at one size, and what else moves the same bytes.

    Attributes:
        name: Op and variant.
        size: Name of the latent size.
        shape: Of the latents.
        moved_bytes: Bytes of all inputs and outputs.
        methods: By name, what makes the call of one launch, with buffers of its own.
        latency_bound: Whether its bytes say nothing of its time; then a few launches do, and what
            it works on may stay in the L2 cache.
    """

    name: str
    size: str
    shape: tuple[int, ...]
    moved_bytes: int
    methods: Mapping[str, Callable[[], Call]]
    latency_bound: bool = False


def pack_cases(device: torch.device) -> list[KernelCase]:
    """`pack` and `unpack` at every size, patch, dtype and order of features."""
    return [
        pack_case(device, size, patch, dtype, channels_last, backwards)
        for size, patches in PATCH_SIZES.items()
        for patch in patches
        for dtype in DTYPES
        for channels_last in (False, True)
        for backwards in (False, True)
    ]


def pack_case(
    device: torch.device,
    size: str,
    patch: int,
    dtype: torch.dtype,
    channels_last: bool,
    unpack: bool,
) -> KernelCase:
    """`pack`, or `unpack`, beside torch's own operations and a copy of the same bytes."""
    shape = LATENTS[size]
    tokens_shape = eager_pack(torch.empty(shape, device="meta"), patch, channels_last).shape
    ours = native_unpack if unpack else native_pack
    theirs = eager_unpack if unpack else eager_pack
    source = tokens_shape if unpack else shape

    def launch(function: Callable[..., Tensor]) -> Call:
        tensor = torch.randn(source, device=device).to(dtype)
        if not unpack:
            return partial(function, tensor, patch, channels_last)
        return partial(function, tensor, patch, channels_last, shape)

    def copy() -> Call:
        return torch.randn(source, device=device).to(dtype).clone

    order = f"channels {'last' if channels_last else 'first'}"
    name = f"{'unpack' if unpack else 'pack'} p={patch} {str(dtype).removeprefix('torch.')} {order}"
    return KernelCase(
        name=name,
        size=size,
        shape=shape,
        moved_bytes=2 * math.prod(shape) * dtype.itemsize,
        methods={
            "native": partial(launch, ours),
            "eager": partial(launch, theirs),
            "copy": copy,
        },
    )


def native_pack(latents: Tensor, patch: int, channels_last: bool) -> Tensor:
    """`ops.pack`."""
    return ops.pack(latents, patch, channels_last=channels_last)


def native_unpack(
    tokens: Tensor, patch: int, channels_last: bool, shape: tuple[int, ...]
) -> Tensor:
    """`ops.unpack`."""
    height, width = shape[-2:]
    frames = shape[2] if len(shape) == 5 else 0
    return ops.unpack(tokens, patch, height, width, frames, channels_last=channels_last)


def eager_pack(latents: Tensor, patch: int, channels_last: bool) -> Tensor:
    """The same with torch's own operations: one strided copy."""
    batch, channels, *frames, height, width = latents.shape
    rows, columns, depth = height // patch, width // patch, frames[0] if frames else 1
    split = latents.view(batch, channels, depth, rows, patch, columns, patch)
    order = (0, 2, 3, 5, 4, 6, 1) if channels_last else (0, 2, 3, 5, 1, 4, 6)
    return split.permute(order).reshape(batch, depth * rows * columns, channels * patch**2)


def eager_unpack(tokens: Tensor, patch: int, channels_last: bool, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `eager_pack`."""
    batch, channels, *frames, height, width = shape
    rows, columns, depth = height // patch, width // patch, frames[0] if frames else 1
    if channels_last:
        split = tokens.view(batch, depth, rows, columns, patch, patch, channels)
        return split.permute(0, 6, 1, 2, 4, 3, 5).reshape(shape)
    split = tokens.view(batch, depth, rows, columns, channels, patch, patch)
    return split.permute(0, 4, 1, 2, 5, 3, 6).reshape(shape)


def step_cases(device: torch.device) -> list[KernelCase]:
    """Update and decision at every size."""
    return [case(device, size) for size in SIZES for case in (update_case, decide_case)]


def update_case(device: torch.device, size: str) -> KernelCase:
    """The solver step, the history, and the moments of the next decision's difference.

    Per value it reads three latents and the velocity, and writes the next latent and the place of
    the latest in the history; all in fp32. Moments are few.
    """
    shape = LATENTS[size]
    moved = 6 * _FP32 * math.prod(shape)
    return KernelCase(
        name="update, euler, order 3",
        size=size,
        shape=shape,
        moved_bytes=moved,
        methods={
            "native": partial(_launch, "update", device, size),
            "copy": partial(_copy, device, moved),
        },
    )


def decide_case(device: torch.device, size: str) -> KernelCase:
    """The quantile of every size, and the policy; in use, too, its input is in the cache.

    It reads mean and squared deviations of the base patches, and writes and reads a key for each
    patch; the floor counts the moments alone.
    """
    shape = LATENTS[size]
    rows, columns = (-(-edge // (PATCH * OFFERED[1])) for edge in shape[-2:])
    return KernelCase(
        name=f"decide, {len(OFFERED) - 1} coarse sizes",
        size=size,
        shape=shape,
        moved_bytes=2 * _FP32 * math.prod(shape[2:-2]) * rows * columns,
        methods={"native": partial(_launch, "decide", device, size)},
        latency_bound=True,
    )


def plan_of() -> RunPlan:
    """A run without buckets whose every step is scored."""
    coarse = len(OFFERED) - 1
    row = torch.tensor([1.0, 0.0, 0.0, -1 / _STEPS, 0.0, 0.0], dtype=torch.float64)
    sigmas = tuple(1 - step / _STEPS for step in range(_STEPS + 1))
    return RunPlan(
        buckets=((),),
        stages=(0,) * _STEPS,
        stage_names=("",),
        offered=OFFERED,
        policy=PolicyTable(
            forced=(DYNAMIC,) * _STEPS,
            labels=("",) * _STEPS,
            thresholds=((1e-3,) * coarse,) * _STEPS,
        ),
        solver=SolverTable(coefficients=row.repeat(_STEPS, 1), sigmas=sigmas, source="euler"),
        patch_size=PATCH,
        capacity=_STEPS,
    )


def _launch(kernel: str, device: torch.device, size: str) -> Call:
    """A launch of one kernel of a loop that has taken some steps, on the current stream."""
    shape = torch.Size(LATENTS[size])
    plan = plan_of()
    runtime: Any = _runtime
    buffers = LoopBuffers(plan, shape, device, runtime)
    control = buffers.control(runtime, device)
    buffers.load(plan, torch.randn(shape, device=device))
    buffers.velocity.normal_()
    stream = _current(device)
    control.begin(stream)
    for _ in range(_FIRST):
        control.decide(stream)
        control.update(stream)
    launch: Callable[[int], None] = getattr(control, kernel)
    return lambda: launch(_current(device))


def _copy(device: torch.device, moved_bytes: int) -> Call:
    """A copy that moves as many bytes, reads and writes together."""
    return torch.empty(moved_bytes // 2, dtype=torch.uint8, device=device).clone


def _current(device: torch.device) -> int:
    """The stream that torch captures or runs on."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def capture(builders: Sequence[Callable[[], Call]]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of one launch each, and what must live as long as it: buffers and results.

    Results are kept, or the allocator would give all launches the same memory, which then stays in
    the L2 cache.
    """
    calls = [build() for build in builders]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, [calls, results]


def launches(moved_bytes: int, l2_bytes: int) -> int:
    """Launches in a graph: buffers of some L2 caches together, within bounds."""
    wanted = math.ceil(_L2_MULTIPLE * l2_bytes / moved_bytes)
    return max(_FEWEST_LAUNCHES, min(_MOST_LAUNCHES, wanted))


def microseconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Time of one launch, over some replays of a graph of `count`."""
    begin, end = cuda_events()
    begin.record()
    for _ in range(_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / (_REPLAYS * count)


def measure(case: KernelCase, rounds: int, l2_bytes: int) -> dict[str, Any]:
    """Time of one launch of every method, in turns."""
    count = _FEWEST_LAUNCHES if case.latency_bound else launches(case.moved_bytes, l2_bytes)
    graphs = {name: capture([build] * count) for name, build in case.methods.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for index in range(rounds + 1):
        for name, (graph, _) in graphs.items():
            elapsed = microseconds(graph, count)
            if index:  # the first round warms up
                times[name].append(elapsed)
    return {
        "launches": count,
        "microseconds": {name: spread(values) for name, values in times.items()},
    }


def entry(case: KernelCase, rounds: int, l2_bytes: int, bandwidth: float) -> dict[str, Any]:
    """One entry of the results; an error in place of times if there are none."""
    head = {
        "op": case.name,
        "size": case.size,
        "latents": list(case.shape),
        "moved_bytes": case.moved_bytes,
        "floor_us": case.moved_bytes / bandwidth * 1e6,
    }
    result, problem = attempt(partial(measure, case, rounds, l2_bytes))
    release()
    if problem is not None:
        return {**head, "error": problem}
    if not case.latency_bound:
        result["over_floor"] = result["microseconds"]["native"]["median"] / head["floor_us"]
    return {**head, **result}


def run(arguments: argparse.Namespace) -> None:
    """Runs all cases and writes the results, and the table of docs/benchmarks.md from them."""
    if not torch.cuda.is_available():
        raise SystemExit(f"got --device {arguments.device}, but torch sees no CUDA device")
    device = torch.device("cuda", torch.device(arguments.device).index or 0)
    torch.cuda.set_device(device)
    machine = machine_entry(device)
    bandwidth = copy_rate(device)
    rows = []
    for case in [*pack_cases(device), *step_cases(device)]:
        rows.append(entry(case, arguments.rounds, machine["gpu"]["l2_bytes"], bandwidth))
        print(rows[-1], flush=True)
    report = head(
        machine=machine,
        copy_bytes_per_second=bandwidth,
        rounds=arguments.rounds,
        replays=_REPLAYS,
        results=rows,
    )
    publish(arguments.out or RESULTS / "ops_cuda.json", report)
