"""Held-out confirmation: which kind of plan is taken, on prompts that the search never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddit_rt.lab.plans.bench import Bench
from ddit_rt.lab.plans.candidates import (
    CACHED,
    COMBINED,
    DYNAMIC,
    KINDS,
    STATIC,
    STEPS,
    cache_text,
    full_resolution,
)
from ddit_rt.lab.plans.points import Measurement, Point, Prompt
from ddit_rt.lab.plans.target import SPEEDUP, Target

SPARE = "spare"
"""Name of the plan that has room to the target: what some plans cost hangs on the prompts."""

_NAMES = {
    STEPS: "fewer steps",
    STATIC: "a static plan",
    CACHED: "steps at p with a step cache",
    DYNAMIC: "a dynamic plan",
    COMBINED: "coarse steps with a step cache",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """Held-out figures, and what they decide.

    Attributes:
        winner: Name of the plan that is taken.
        met: Whether it keeps the target on the held-out prompts, within 10% of cost or 0.02 of
            similarity.
        fine: Full resolution on the held-out prompts.
        candidates: The best plan of each kind for the target, by its kind, the simplest first; and
            as `SPARE` the best of all that has a tenth to spare, if that is none of them.
        shares: For each other plan, the share of held-out prompts on which the winner is more
            similar; a tie counts half.
    """

    winner: str
    met: bool
    fine: Measurement
    candidates: Mapping[str, Point]
    shares: Mapping[str, float]

    def speedup(self, plan: Point) -> float:
        """Speed-up over full resolution, measured side by side."""
        return self.fine.cost / plan.cost

    @property
    def decision(self) -> str:
        """What won, in a sentence."""
        best = self.candidates[self.winner]
        name = _NAMES[best.candidate.kind]
        if best.candidate.kind == STEPS:
            name = f"{name} ({best.candidate.num_inference_steps})"
        if cache := cache_text(best.candidate.step_cache):
            name = f"{name} ({cache})"
        others = [_NAMES[kind] for kind in self.candidates if kind not in (self.winner, SPARE)]
        listed = " and ".join([", ".join(others[:-1]), *others[-1:]] if others[1:] else others)
        over = f", over {listed}" if others else ", as the only candidate"
        missed = "" if self.met else "; it misses the target on the held-out prompts"
        return f"{name} won{over}{missed}"


def confirm(
    bench: Bench,
    best: Mapping[str, Point],
    prompts: Sequence[Prompt],
    request: Mapping[str, float],
    target: Target,
) -> Confirmation:
    """Measures the best plans side by side with full resolution, and decides.

    The one wins that serves the target best here; of equal ones the simpler. So no other kind has
    a plan for the target that is better on these prompts.

    Args:
        bench: Runs plans.
        best: The best point of each kind on the calibration prompts, and the one with room.
        prompts: Held-out prompts.
        request: What the caller asked for.
        target: The same as a limit on the calibration prompts.
    """
    kinds = [kind for kind in (*KINDS, SPARE) if kind in best]
    plans = [full_resolution(bench.tables.steps), *(best[kind].candidate for kind in kinds)]
    fine, *results = bench.confirm(plans, prompts)
    held_out = {
        kind: Point(candidate=best[kind].candidate, measurement=result)
        for kind, result in zip(kinds, results, strict=True)
    }
    if SPEEDUP in request:  # relative to full resolution, measured again beside the plans
        target = Target(max_cost=fine.cost / request[SPEEDUP])
    winner = min(kinds, key=lambda kind: target.held_out_rank(held_out[kind]))
    return Confirmation(
        winner=winner,
        met=target.met_on_held_out(held_out[winner]),
        fine=fine,
        candidates=held_out,
        shares={
            kind: _share(held_out[winner].measurement, held_out[kind].measurement)
            for kind in kinds
            if kind != winner
        },
    )


def _share(one: Measurement, other: Measurement) -> float:
    pairs = list(zip(one.similarity, other.similarity, strict=True))
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
