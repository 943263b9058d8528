"""Section `loops`: the whole denoising loop, all methods in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from real_methods import BASELINE, Method, all_methods
from real_models import Case
from real_plans import counted_speedup
from real_setup import Setup
from records import Save, unsaved
from timing import Measured, attempt, spread, take_turns
from torch import Tensor


def loops(
    setup: Setup, case: Case, patterns: Sequence[str] = ("*",), save: Save = unsaved
) -> dict[str, Any]:
    """Measures the methods whose names match a pattern, and always the baseline.

    Args:
        setup: The run of the script.
        case: The size and the number of steps.
        patterns: Those that are wanted.
        save: Given the record whenever there is more of it.
    """
    torch.compiler.reset()  # what an earlier size compiled would make this one compile for both
    setup.engine_error()  # compiled before, not inside, the warm-up of a method
    methods = {
        name: method
        for name, method in all_methods(setup, case).items()
        if name == BASELINE or any(fnmatch(name, pattern) for pattern in patterns)
    }
    flops = setup.flops(case)

    def record(measured: Mapping[str, Measured]) -> dict[str, Any]:
        rows = {
            name: row_of(method, measured[name], measured[BASELINE], flops)
            for name, method in methods.items()
        }
        return {"backend": setup.blocks, "flops_per_step": flops, "rows": rows}

    return record(
        take_turns(
            {name: method.build for name, method in methods.items()},
            repeats=setup.repeats,
            device=setup.device,
            deadline=setup.deadline,
            warm_up_limit=setup.warm_up_limit,
            on_news=lambda measured: save(record(measured)),
        )
    )


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
        row["relative_error"], problem = attempt(
            lambda: relative_error(own.results[-1], baseline.results[-1])
        )
        if problem is not None:
            row["relative_error_problem"] = problem
    return row


def relative_error(latents: Tensor, reference: Tensor) -> float | None:
    """|x - r| / |r| in the Euclidean norm; None where a value is not finite."""
    reference = reference.double()
    error = float((latents.double() - reference).norm() / reference.norm())
    return error if error == error and error != float("inf") else None
