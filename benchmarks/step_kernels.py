"""What `ops_cuda.py` times, one op at one size; and the step loop's own kernels as such cases.

Each launch of a case works on buffers of its own, set up as in the middle of a run whose every step
is scored: the solver is Euler's, the difference the third, the sizes those of 2p and 4p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timing import Call

from ddit_rt import _runtime
from ddit_rt.loop import RunPlan
from ddit_rt.loop.buffers import LoopBuffers
from ddit_rt.policies import DYNAMIC, PolicyTable
from ddit_rt.solver import SolverTable

LATENTS: Mapping[str, tuple[int, ...]] = {
    "FLUX 1024": (1, 16, 128, 128),
    "Wan 480p": (1, 16, 21, 60, 104),
    "Wan 720p": (1, 16, 21, 90, 160),
    "Wan 704p": (1, 16, 21, 88, 160),  # where 4 and 8 divide, which pack needs
}


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


_STEPS = 4096  # a decision is for the next step each time: enough for all replays of a graph
_FIRST = 4  # decisions before anything is timed, so that the loop has a history
_FP32 = 4
PATCH = 2
OFFERED = (1, 2, 4)
SIZES = ("FLUX 1024", "Wan 480p", "Wan 720p")


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
