"""Dials of plans: how far to turn them, over which range, and what a step costs on the way.

A dial has whole levels from 0. Cost and fidelity of its plans both fall as the level rises, so a
question with one answer up to some level and the other above it is settled by bisection.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from ddit_rt.errors import ShapeError
from ddit_rt.loop import RunTrace, StepRecord
from ddit_rt.policies import DDiTPolicy, FinePolicy, NoCache, PatchPolicy, StaticPolicy, StepCache

Run = Callable[[PatchPolicy, StepCache], RunTrace]
"""Generates with a policy and a step cache."""

TAU_PROBES = tuple(
    DDiTPolicy(tau, refresh=None, fine_tail=0, criterion="raw") for tau in (0.0, 1e30)
)
"""Policies whose scores bound tau: one takes no coarse step, the other as many as it can."""

_NO_SCORES = (1e-5, 1e-1)
"""Range of tau where a run is too short for a score."""


def highest(levels: int, holds: Callable[[int], bool]) -> int:
    """Finds by bisection the highest level at which something holds.

    Args:
        levels: The highest level of the dial.
        holds: Whether it holds at a level. It is asked about log2(levels + 1) levels, never about
            level 0, which is the answer where it holds nowhere.
    """
    low, high = 0, levels + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def on_log_scale(ends: tuple[float, float], level: int, levels: int) -> float:
    """Value of a level, 0 to `levels`, evenly spaced on a log scale, to four digits."""
    low, high = ends
    return float(f"{low * math.pow(high / low, level / max(levels, 1)):.4g}")


def tau_range(traces: Iterable[RunTrace]) -> tuple[float, float]:
    """Range of tau for runs with the policies of `TAU_PROBES`.

    Returns:
        A tau below which every step is at p, and one above which none is that may be coarse.
    """
    scores = [score for trace in traces for record in trace for score in record.scores.values()]
    usable = [score for score in scores if score > 0 and math.isfinite(score)]
    return (min(usable) / 2, max(usable) * 2) if usable else _NO_SCORES


def branch(record: StepRecord) -> str:
    """What a step did, as `step_costs` names it: `"2p"`, or `"2p reused"`."""
    return f"{record.patch_size} reused" if record.reused else record.patch_size


def step_costs(
    run: Run,
    sizes: Sequence[str],
    steps: int,
    *,
    cache: StepCache = NoCache(),  # noqa: B008 - frozen
    unit: str = "ms",
    rounds: int = 1,
    warm_up: bool = True,
) -> dict[str, float]:
    """Measures what one step costs at each patch size, computed and reused.

    Args:
        run: Runs `steps` steps.
        sizes: Patch sizes, `"p"` among them; one that the run's shape does not offer is left out.
        steps: Denoising steps.
        cache: A step cache that computes and reuses in turn, to measure what both cost.
        unit: `"ms"`, or `"tokens"` for image tokens.
        rounds: Measured runs of each size.
        warm_up: Whether one before them warms up.

    Returns:
        The median over all steps, by branch.
    """
    samples: dict[str, list[float]] = {}
    offered = list(sizes)
    for number in range(rounds + warm_up):
        for size in tuple(offered):
            policy = FinePolicy() if size == "p" else StaticPolicy([size] * steps)
            try:
                trace = run(policy, cache)
            except ShapeError:
                if size == "p":
                    raise
                offered.remove(size)
                continue
            for record in trace if number >= warm_up else ():
                cost = record.latency_ms if unit == "ms" else float(record.tokens)
                samples.setdefault(branch(record), []).append(cost)
    return {name: statistics.median(costs) for name, costs in samples.items()}
