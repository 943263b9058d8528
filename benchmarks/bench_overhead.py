"""What the runtime itself costs: per step with a model that costs nothing, and to load.

    python benchmarks/bench_overhead.py [--out benchmarks/results/overhead_cpu.json]

The step loop runs with buckets that return a constant velocity, so decision, scores, solver and
Python are all that is left; diffusers' scheduler in a plain loop stands beside it, and the ops
alone. `loop` is what `dynamic` (scores at every step) adds to its ops. Methods take turns. `look`
is the look at the live model before each run, on tiny blocks in FLUX's number. The artifact is that
of the demo model.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from real_models import Flux
from records import RESULTS, head, parser_of, publish
from timing import rounds_of, spread
from torch import Tensor

import ddit_rt
from ddit_rt import ops
from ddit_rt.live import LiveModel
from ddit_rt.loop import CpuExecutor, RunPlan
from ddit_rt.models import family_of
from ddit_rt.policies import DDiTPolicy, FinePolicy, PatchPolicy, Schedule
from ddit_rt.solver import probe_scheduler
from ddit_rt.sources import load_pipeline
from ddit_rt.steps import StepInputs

RESULT = RESULTS / "overhead_cpu.json"
SHAPES = ((1, 16, 32, 32), (1, 16, 128, 128), (4, 16, 128, 128))
OFFERED = (1, 2, 4)
PATCH = 2


class ConstantBucket:
    """A model that costs nothing."""

    def __init__(self, multiple: int, velocity: Tensor) -> None:
        self.multiple = multiple
        self.tokens = velocity.shape[-1] * velocity.shape[-2] // (PATCH * multiple) ** 2
        self._velocity = velocity

    def velocity(
        self,
        latents: Tensor,  # noqa: ARG002 - the interface
        step: Tensor,  # noqa: ARG002
        *,
        reuse: bool = False,  # noqa: ARG002
        guided: bool = True,  # noqa: ARG002
    ) -> Tensor:
        """The same at every step."""
        return self._velocity

    def residuals(self) -> tuple[Tensor, ...]:
        """None: it has no blocks."""
        return ()

    def sound(self) -> None:
        """None."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Nothing that differs between runs."""
        return ()

    def state(self) -> tuple[Tensor, ...]:
        """Nothing that it keeps."""
        return ()

    def refresh(self, step: int, now: StepInputs) -> None:
        """Nothing that it reads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements."""
    parser = parser_of(__doc__, RESULT)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--no-model", action="store_true", help="skip the artifact")
    args = parser.parse_args(argv)
    steps = [step_times(shape, args.steps, args.rounds) for shape in SHAPES]
    figures = {} if args.no_model else {"artifact": {"load_seconds": load_seconds()}}
    publish(args.out, head(steps=steps, look=look_times(20 * args.rounds), **figures))
    return 0


def step_times(shape: tuple[int, ...], steps: int, rounds: int) -> dict[str, Any]:
    """Microseconds per step at one latent shape."""
    torch.manual_seed(0)
    latents, velocity = torch.randn(shape), torch.randn(shape)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    dynamic = null_plan(scheduler, velocity, DDiTPolicy(warmup="fine", fine_tail=0))
    fine = null_plan(scheduler, velocity, FinePolicy())
    executor = CpuExecutor()
    calls: dict[str, Callable[[], Any]] = {
        "dynamic": lambda: executor.run(dynamic, latents),
        "fine": lambda: executor.run(fine, latents),
        "diffusers": lambda: scheduler_loop(scheduler, latents, velocity),
        **op_loops(dynamic, latents, velocity),
    }
    with torch.no_grad():
        times, _ = rounds_of(calls, rounds, steps)
    parts = sum(times[name]["median"] for name in ("scores", "decide", "solver"))
    return {
        "latent_shape": list(shape),
        "steps": steps,
        "microseconds": times,
        "loop": times["dynamic"]["median"] - parts,
    }


def null_plan(scheduler: Any, velocity: Tensor, policy: PatchPolicy) -> RunPlan:
    """A run whose buckets cost nothing."""
    solver = probe_scheduler(scheduler)
    return RunPlan(
        buckets=[[ConstantBucket(multiple, velocity) for multiple in OFFERED]],
        stages=(0,) * solver.steps,
        stage_names=("",),
        offered=OFFERED,
        policy=policy.resolve(Schedule(sigmas=solver.sigmas, offered=OFFERED)),
        solver=solver,
        patch_size=PATCH,
        capacity=solver.steps,
    )


def scheduler_loop(scheduler: Any, latents: Tensor, velocity: Tensor) -> Tensor:
    """The scheduler of diffusers in a plain Python loop."""
    scheduler = copy.copy(scheduler)  # its step counter starts anew
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def op_loops(plan: RunPlan, latents: Tensor, velocity: Tensor) -> dict[str, Callable[[], None]]:
    """Each op alone, as often as the dynamic run calls it."""
    policy, steps = plan.policy, plan.policy.steps
    history = torch.stack([latents + 0.01 * k for k in range(4)])
    sizes = [PATCH * multiple for multiple in OFFERED[1:]]
    forced, thresholds = policy.tensors()
    scores = torch.ones(latents.shape[0], len(sizes))
    decision = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    record = torch.zeros(steps, 3 + len(sizes))
    past = torch.zeros(plan.solver.velocity_depth - 1, *latents.shape)

    def score() -> None:
        for step in range(steps):
            if policy.scored(step):
                ops.patch_scores(history, sizes, policy.quantile, policy.order, -step % 4)

    def decide() -> None:
        decision.copy_(torch.tensor([-1, 0, 0, 0], dtype=torch.int32))
        for step in range(steps):
            ops.decide_(
                scores, forced, thresholds, decision, record, step, policy.dwell, policy.monotone
            )

    def solve() -> None:
        for step in range(steps):
            ops.solver_step_(history, past, velocity, plan.solver.coefficients, step)

    return {"scores": score, "decide": decide, "solver": solve}


def look_times(calls: int) -> dict[str, Any]:
    """Milliseconds of the look at the live model, on one of FLUX's depth, by one thread."""
    flux, tiny = Flux(), Flux.presets["tiny"]
    deep = {**tiny.config, "num_layers": 19, "num_single_layers": 38}
    preset = replace(tiny, config=deep)
    transformer = flux.transformer(preset, torch.device("cpu"), torch.float32)
    live = LiveModel(family_of(transformer), transformer, flux.pipeline(transformer))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        looks = {"look": live.check}
        times = [rounds_of(looks, 1, 1)[0]["look"]["median"] * 1e-3 for _ in range(calls)]
    finally:
        torch.set_num_threads(threads)
    return {
        "blocks": deep["num_layers"] + deep["num_single_layers"],
        "modules": sum(1 for _ in transformer.modules()),
        "milliseconds": spread(times),
    }


def load_seconds() -> float:
    """Seconds to load the demo model's artifact, of a process that has loaded its libraries."""
    pipeline = load_pipeline("demo")
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as folder:
        path = Path(folder) / "demo.ddit"
        ddit_rt.compile(pipeline, height=128, width=128, progress=False).save(path)
        started = time.perf_counter()
        ddit_rt.load(path, pipeline, progress=False)
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
