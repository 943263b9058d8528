"""Section `loops`: the denoising loop by diffusers, by its own means for speed, and by ddit_rt.

All methods go through the call of the same pipeline class with the same embeddings, noise, steps
and dtype, without text encoders and VAE, and all read the same weights. They take turns.

The plans `paper_...x` have a chosen speed-up by count. The paper reports 2.18x and 3.52x for
FLUX.1-dev but not how many steps took which patch size. The plans here give the model that many
times fewer floating-point operations than all steps at p, by the operations of one step at each
size: of all numbers of steps at 2p and at 4p that come within 2% of the wanted ratio, the most even
pair. With costs 1, r2 and r4 (relative to p) and equal shares x of 2p and 4p the ratio S is reached
at about x = (1 - 1/S) / (2 - r2 - r4). Coarse steps come first, as where latents are smooth. A
step's time is not its count, so the measured speed-up differs from the wanted one.

`...+teacache` is a schedule in which every other step reuses, as far as its sizes allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from diffusers import MagCacheConfig
from real_models import Case
from real_setup import Setup, captures_of
from records import Save
from timing import Call, Measured, spread
from torch import Tensor

from ddit_rt.loop import RunTrace
from ddit_rt.policies import (
    DDiTPolicy,
    FinePolicy,
    NoCache,
    PatchPolicy,
    StaticPolicy,
    StepCache,
    TeaCache,
)

BASELINE = "diffusers_eager"
_TOLERANCE = 0.02
_COMPUTES = "blocks.0.attn1.to_q"
"""A layer of Wan that runs only where a step computes."""
_SKIP = "+teacache"

# At its threshold of 0.08 TeaCache makes Wan 2.1 1.3B twice as fast (88 s of 175 s, by its
# repository), so about half of the steps reuse there. With random weights the published polynomial
# says nothing: the time embedding changes by most of itself at every step, and none or all would
# reuse. A constant in its place gives the same share, and on Wan, where the steps that reuse are
# known beforehand, the same cost.
EVERY_OTHER = TeaCache(1.5, coefficients=(1.0,), last=0)


def loops(setup: Setup, case: Case, save: Save) -> dict[str, Any]:
    """Measures the methods whose names match a pattern, and always the baseline."""
    torch.compiler.reset()  # what an earlier size compiled would make this one compile for both
    setup.engine_error()  # compiled before, not inside, the warm-up of a method
    methods = {
        name: method
        for name, method in all_methods(setup, case).items()
        if name == BASELINE or any(fnmatch(name, pattern) for pattern in setup.args.methods)
    }
    flops = setup.flops(case)

    def record(measured: Mapping[str, Measured]) -> dict[str, Any]:
        rows = {
            name: row_of(method, measured[name], measured[BASELINE], flops)
            for name, method in methods.items()
        }
        return {"backend": setup.blocks, "flops_per_step": flops, "rows": rows}

    builders = {name: method.build for name, method in methods.items()}
    return setup.in_turns(builders, record, save)


def row_of(
    method: Method, own: Measured, baseline: Measured, flops: Mapping[str, int]
) -> dict[str, Any]:
    """The entry of one method."""
    row: dict[str, Any] = {
        "label": method.label,
        "schedule": method.schedule,
        "executor": method.executor,
    }
    if own.error is not None or not own.seconds:
        return {**row, "error": own.error or "no round was run"}
    row |= {
        "seconds": spread(own.seconds),
        "wall_seconds": spread(own.wall_seconds),
        "first_call_seconds": own.first_call_seconds,
        "provisional": own.provisional,
        "finite": bool(torch.isfinite(own.results[-1]).all()),
        **method.details(),
    }
    if "patch_sizes" in row:
        computed = [size for size, count in row["computed_sizes"].items() for _ in range(count)]
        reused = sum(row["patch_sizes"].values()) - len(computed)
        row["counted_speedup"] = counted_speedup(computed, flops, reused)
    if baseline.error is None and baseline.seconds:
        row["baseline_seconds"] = spread(baseline.seconds)
        row["speedup"] = row["baseline_seconds"]["median"] / row["seconds"]["median"]
        row["relative_error"] = relative_error(own.results[-1], baseline.results[-1])
    return row


def relative_error(latents: Tensor, reference: Tensor) -> float | None:
    """|x - r| / |r| in the Euclidean norm; None where a value is not finite."""
    reference = reference.double()
    error = float((latents.double() - reference).norm() / reference.norm())
    return error if error == error and error != float("inf") else None


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to run the loop.

    Attributes:
        label: Name for people.
        build: Makes its call, which returns final latents.
        schedule: One of the model's.
        executor: Form of our executor; None for diffusers.
        details: What its calls did, asked after the last of them.
    """

    label: str
    build: Callable[[], Call]
    schedule: str = "fine"
    executor: str | None = None
    details: Callable[[], dict[str, Any]] = dict


def all_methods(setup: Setup, case: Case) -> dict[str, Method]:
    """Everything that the benchmark compares, the baseline first.

    What takes longest to get ready comes last: if time runs out, the others are measured.
    """
    methods = {
        BASELINE: Method(label="diffusers, eager", build=lambda: _call(setup, case, setup.pipeline))
    }
    for form in setup.args.executors:
        for schedule in setup.model.schedules:
            name = f"ddit_rt_{form}_{schedule}"
            methods[name] = engine_method(setup, case, schedule, form)
    if (cache := setup.model.cache(case.steps)) is not None:
        methods["mag_cache"] = cached_method(setup, case, cache)
    # Block by block, as diffusers recommends, and whole.
    for scope in ("regional", "full"):
        methods[f"compile_{scope}"] = Method(
            label=f"diffusers + torch.compile ({scope})",
            build=partial(_compiled, setup, case, scope),
        )
    return methods


def _call(setup: Setup, case: Case, pipeline: Any) -> Call:
    arguments = setup.request(case)
    return lambda: setup.model.latents(pipeline(**arguments))


def _compiled(setup: Setup, case: Case, scope: str) -> Call:
    pipeline = setup.model.with_shared_weights(setup.pipeline)
    if scope == "regional":
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    else:
        pipeline.transformer.compile()
    return _call(setup, case, pipeline)


def cached_method(setup: Setup, case: Case, config: MagCacheConfig) -> Method:
    """MagCache of diffusers, whose hooks decide in Python, so that it runs uncompiled."""
    ran: list[int] = []

    def build() -> Call:
        pipeline = setup.model.with_shared_weights(setup.pipeline)
        pipeline.transformer.enable_cache(config)
        call = _call(setup, case, pipeline)
        ran.clear()
        layer = pipeline.transformer.get_submodule(_COMPUTES)
        hook = layer.register_forward_pre_hook(lambda *_: ran.append(1))
        call()
        hook.remove()
        return call

    def details() -> dict[str, Any]:
        """How many steps of the counted call ran all blocks, and the share that did not."""
        computed = len(ran) // setup.model.passes
        return {"computed_steps": computed, "reused_share": 1 - computed / case.steps}

    label = "diffusers + MagCache (every other step)"
    return Method(label=label, build=build, details=details)


def engine_method(setup: Setup, case: Case, schedule: str, form: str) -> Method:
    """One schedule in one form of our executor."""
    traces: list[RunTrace] = []
    captured: list[bool] = []

    def build() -> Call:
        setup.need_engine()
        request = setup.request(case)
        policy = policy_of(schedule, setup.flops(case), case.steps)

        def call() -> Tensor:
            before = captures_of(setup.engine)
            latents = setup.generate(request, policy, form, cache_of(schedule))
            captured.append(captures_of(setup.engine) != before)
            assert setup.engine.last_trace is not None, "a run leaves a trace"
            traces[:] = [setup.engine.last_trace]
            return latents

        return call

    def details() -> dict[str, Any]:
        """Patch sizes, reuse, tokens and notes of the latest run, and how it was executed."""
        (trace,) = traces
        return {
            "ran_on": trace.executor,
            "patch_sizes": _counts(trace.patch_sizes()),
            "computed_sizes": _counts([step.patch_size for step in trace if not step.reused]),
            "reused_share": trace.reused / len(trace),
            "tokens": trace.tokens,
            "notes": list(trace.notes),
            # Other than 0: graphs were captured again while others were timed.
            "late_captures": sum(captured[1:]),
        }

    label = f"ddit_rt, {schedule}"
    return Method(label=label, build=build, schedule=schedule, executor=form, details=details)


def _counts(sizes: Sequence[str]) -> dict[str, int]:
    """In the order in which they come up."""
    return {size: sizes.count(size) for size in dict.fromkeys(sizes)}


def policy_of(schedule: str, flops: Mapping[str, int], steps: int) -> PatchPolicy:
    """The patch policy of a schedule.

    Args:
        schedule: `"fine"`, `"dynamic"`, or `"paper_...x"` with a speed-up. What
            `cache_of` reads is left out.
        flops: Operations of one step by patch size, `"p"`, `"2p"` and, where offered, `"4p"`.
        steps: Denoising steps.

    Raises:
        ValueError: No plan comes near the wanted ratio.
    """
    schedule = schedule.removesuffix(_SKIP)
    if schedule == "fine":
        return FinePolicy()
    if schedule == "dynamic":
        return DDiTPolicy()
    wanted = float(schedule.removeprefix("paper_").removesuffix("x"))
    return StaticPolicy(plan_for_speedup(wanted, flops, steps))


def cache_of(schedule: str) -> StepCache:
    """Which steps of a schedule reuse."""
    return EVERY_OTHER if schedule.endswith(_SKIP) else NoCache()


def plan_for_speedup(speedup: float, flops: Mapping[str, int], steps: int) -> list[str]:
    """The patch size of every step; the module docstring says which.

    Raises:
        ValueError: No plan comes within 2%.
    """
    plans = [
        (coarsest, coarse)
        for coarsest in range(steps + 1 if "4p" in flops else 1)
        for coarse in range(steps + 1 - coarsest)
    ]
    errors = {
        plan: abs(counted_speedup(_sizes(plan, steps), flops) / speedup - 1) for plan in plans
    }
    best = min(plans, key=lambda plan: (errors[plan] > _TOLERANCE, abs(plan[0] - plan[1])))
    if errors[best] > _TOLERANCE:
        size = "4p" if "4p" in flops else "2p"
        most = counted_speedup([size], flops)
        nearest = min(errors.values())
        raise ValueError(
            f"no plan of {steps} steps at p, 2p and 4p comes within {_TOLERANCE:.0%} of "
            f"{speedup:g}x by count (nearest: {nearest:.1%} off); all steps at {size} give "
            f"{most:.2f}x"
        )
    even = abs(best[0] - best[1])
    best = min((p for p in plans if abs(p[0] - p[1]) == even), key=lambda plan: errors[plan])
    return _sizes(best, steps)


def _sizes(plan: tuple[int, int], steps: int) -> list[str]:
    coarsest, coarse = plan
    return ["4p"] * coarsest + ["2p"] * coarse + ["p"] * (steps - coarsest - coarse)


def counted_speedup(patch_sizes: Sequence[str], flops: Mapping[str, int], reused: int = 0) -> float:
    """How many times fewer operations a run takes than all steps at p.

    Args:
        patch_sizes: Of the steps that compute.
        flops: Operations of one step by patch size.
        reused: Further steps, which reuse: their operations count as none.
    """
    return (len(patch_sizes) + reused) * flops["p"] / sum(flops[patch] for patch in patch_sizes)
