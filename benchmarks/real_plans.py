"""Fixed plans whose count of operations gives a chosen speed-up.

The paper reports 2.18x and 3.52x for FLUX.1-dev but not how many steps took which patch size. The
plans here give the model that many times fewer floating-point operations than all steps at p, by
the operations of one step at each size that `ddit_rt.engine.cost.step_cost` counts: of all
numbers of steps at 2p and at 4p that come within 2% of the wanted ratio, the most even pair. With
costs 1, r2 and r4 (relative to p) and equal shares x of 2p and 4p the ratio S is reached at about
x = (1 - 1/S) / (2 - r2 - r4). Coarse steps come first, as where latents are smooth. A step's time
is not its count, so the measured speed-up differs from the wanted one: that is a result.

`...+teacache` is a schedule in which every other step reuses, as far as its sizes allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddit_rt.policies import (
    DDiTPolicy,
    FinePolicy,
    NoCache,
    PatchPolicy,
    StaticPolicy,
    StepCache,
    TeaCache,
)

MIXED_PLAN = "4p:0.2,2p:0.4,p"
_TOLERANCE = 0.02
_SKIP = "+teacache"

# At its threshold of 0.08 TeaCache makes Wan 2.1 1.3B twice as fast (88 s of 175 s, by its
# repository), so about half of the steps reuse there. With random weights the published polynomial
# says nothing: the time embedding changes by most of itself at every step, and none or all would
# reuse. A constant in its place gives the same share, and on Wan, where the steps that reuse are
# known beforehand, the same cost.
EVERY_OTHER = TeaCache(1.5, coefficients=(1.0,), last=0)


def policy_of(schedule: str, flops: Mapping[str, int], steps: int) -> PatchPolicy:
    """The patch policy of a schedule.

    Args:
        schedule: `"fine"`, `"dynamic"`, `"mixed"`, or `"paper_...x"` with a speed-up. What
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
    if schedule == "mixed":
        return StaticPolicy(MIXED_PLAN)
    wanted = float(schedule.removeprefix("paper_").removesuffix("x"))
    return StaticPolicy(plan_for_speedup(wanted, flops, steps))


def cache_of(schedule: str) -> StepCache:
    """Which steps of a schedule reuse."""
    return EVERY_OTHER if schedule.endswith(_SKIP) else NoCache()


def plan_for_speedup(speedup: float, flops: Mapping[str, int], steps: int) -> list[str]:
    """A patch size for every step; the module docstring says which.

    Raises:
        ValueError: No plan comes within 2%.
    """
    plans = [
        (coarsest, coarse)
        for coarsest in range(steps + 1 if "4p" in flops else 1)
        for coarse in range(steps + 1 - coarsest)
    ]
    errors = {plan: abs(_ratio(plan, flops, steps) / speedup - 1) for plan in plans}
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
    coarsest, coarse = best
    return ["4p"] * coarsest + ["2p"] * coarse + ["p"] * (steps - coarsest - coarse)


def counted_speedup(patch_sizes: Sequence[str], flops: Mapping[str, int], reused: int = 0) -> float:
    """How many times fewer operations a run takes than all steps at p.

    Args:
        patch_sizes: Of the steps that compute.
        flops: Operations of one step by patch size.
        reused: Further steps, which reuse: their operations count as none.
    """
    return (len(patch_sizes) + reused) * flops["p"] / sum(flops[patch] for patch in patch_sizes)


def _ratio(plan: tuple[int, int], flops: Mapping[str, int], steps: int) -> float:
    coarsest, coarse = plan
    cost = coarsest * flops.get("4p", 0) + coarse * flops["2p"] + (steps - sum(plan)) * flops["p"]
    return steps * flops["p"] / cost
