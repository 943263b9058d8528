"""Held-out confirmation: which kind of plan is taken, on prompts that the search never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddit_rt.lab.plans.bench import Bench
from ddit_rt.lab.plans.candidates import (
    ADAPTIVE,
    CACHED,
    COMBINED,
    DYNAMIC,
    STATIC,
    STEPS,
    Candidate,
    cache_text,
    full_resolution,
)
from ddit_rt.lab.plans.points import Found, Measurement, Point, Prompt
from ddit_rt.lab.plans.target import SPEEDUP, Target

_LEAST_LOSS = 1e-9
"""Loss of similarity of a baseline that makes what full resolution makes."""

_BASELINES = (STEPS, STATIC)
_SIMPLEST = (*_BASELINES, *ADAPTIVE)
"""Simple plans first: of plans that serve equally well the simpler one is taken."""

_NAMES = {
    STEPS: "fewer steps",
    STATIC: "a static plan",
    CACHED: "full resolution with a step cache",
    DYNAMIC: "a dynamic plan",
    COMBINED: "a dynamic plan with a step cache",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """A plan and its figures on the held-out prompts."""

    candidate: Candidate
    result: Measurement


ByKind = Mapping[str, HeldOut]
"""Plans by their kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """Held-out figures, and what they decide.

    Attributes:
        winner: Kind of the plan that is taken.
        met: Whether it keeps the target on the held-out prompts, within 10% of cost or 0.02 of
            similarity.
        fine: Full resolution on the held-out prompts.
        candidates: The best plan of each kind.
        baselines: For each adaptive candidate, the baselines at the cost that it has there.
        shares: For each adaptive candidate and baseline, the share of held-out prompts on which
            the candidate is more similar; a tie counts half.
        static: The static plan at the cost that the winner has there; None if that won itself, or
            if none can be as cheap.
        over_static: The share of held-out prompts on which the winner is more similar than it.
    """

    winner: str
    met: bool
    fine: Measurement
    candidates: ByKind
    baselines: Mapping[str, ByKind]
    shares: Mapping[str, Mapping[str, float]]
    static: HeldOut | None
    over_static: float | None

    def speedup(self, plan: HeldOut) -> float:
        """Speed-up over full resolution, measured side by side."""
        return self.fine.cost / plan.result.cost

    @property
    def decision(self) -> str:
        """What won, in a sentence."""
        best, name = self.candidates[self.winner], _NAMES[self.winner]
        if self.winner == STEPS:
            name = f"{name} ({best.candidate.num_inference_steps})"
        if cache := cache_text(best.candidate.step_cache):
            name = f"{name} ({cache})"
        others = [_NAMES[kind] for kind in self.candidates if kind != self.winner]
        listed = " and ".join([", ".join(others[:-1]), *others[-1:]] if others[1:] else others)
        over = f", over {listed}" if others else ", as the only candidate"
        missed = "" if self.met else "; it misses the target on the held-out prompts"
        return f"{name} won{over}{missed}"


def confirm(
    bench: Bench,
    found: Mapping[str, Found],
    best_found: Mapping[str, Point],
    prompts: Sequence[Prompt],
    request: Mapping[str, float],
    target: Target,
) -> Confirmation:
    """Measures the best plan of each kind side by side with full resolution, and decides.

    What an adaptive plan (dynamic, or with a step cache) costs depends on the prompts. So it wins
    only if it is more similar than every baseline (fewer steps, static) of the cost that it has
    here, whatever the target allowed. Of several the cheapest wins where similarity is the limit;
    where cost is, their costs still differ, and the one wins that loses the smallest part of the
    similarity that its best baseline loses.

    Args:
        bench: Runs plans.
        found: What the search found, by kind.
        best_found: The best point of each kind.
        prompts: Held-out prompts.
        request: What the caller asked for.
        target: The same as a limit on the calibration prompts.
    """
    kinds = [kind for kind in _SIMPLEST if kind in best_found]
    fine, best = _measure(bench, {kind: best_found[kind].candidate for kind in kinds}, prompts)
    if SPEEDUP in request:  # relative to full resolution, measured again beside the plans
        target = Target(max_cost=fine.cost / request[SPEEDUP])
    beside = _at_equal_cost(bench, found, best, fine.cost, prompts)
    adaptive = {kind: row for kind, row in beside.items() if kind in ADAPTIVE}
    winner = _winner(best, adaptive, target)
    static = beside.get(winner, {}).get(STATIC)
    return Confirmation(
        winner=winner,
        met=target.met_on_held_out(best[winner].result),
        fine=fine,
        candidates=best,
        baselines=adaptive,
        shares={
            kind: {name: _share(best[kind].result, plan.result) for name, plan in row.items()}
            for kind, row in adaptive.items()
        },
        static=static,
        over_static=_share(best[winner].result, static.result) if static else None,
    )


def _winner(best: ByKind, equal: Mapping[str, ByKind], target: Target) -> str:
    """The kind that wins; `best` has the simplest first."""
    simple = [kind for kind in best if kind in _BASELINES]
    winner = min(simple or best, key=lambda kind: target.held_out_rank(best[kind].result))
    none_meets = not simple or not target.met_on_held_out(best[winner].result)

    def loss(kind: str) -> float:
        baseline = max((plan.result.ssim for plan in equal[kind].values()), default=0.0)
        return (1 - best[kind].result.ssim) / max(1 - baseline, _LEAST_LOSS)

    standing = [
        kind
        for kind in equal
        if target.met_on_held_out(best[kind].result) and (none_meets or loss(kind) < 1)
    ]
    if target.max_cost is None:
        return min(standing, key=lambda kind: best[kind].result.cost, default=winner)
    return min(standing, key=loss, default=winner)


def _at_equal_cost(
    bench: Bench, found: Mapping[str, Found], best: ByKind, whole: float, prompts: Sequence[Prompt]
) -> dict[str, dict[str, HeldOut]]:
    """Baselines at the cost of each other plan, those that can be as cheap; by that plan's kind.

    Args:
        bench: Runs plans.
        found: What the search found, by kind.
        best: The plans.
        whole: Cost of full resolution on the held-out prompts.
        prompts: Held-out prompts.
    """
    scale = bench.costs["p"] * bench.steps / whole
    wanted: dict[str, dict[str, Candidate]] = {kind: {} for kind in best if kind != STATIC}
    for kind, row in wanted.items():
        for name in _BASELINES:
            if name in found and name != kind:
                plan = found[name].costing(best[kind].result.cost * scale, bench.costs)
                row.update({} if plan is None else {name: plan})
    known = {plan.candidate.key: plan for plan in best.values()}
    fresh = {plan.key: plan for row in wanted.values() for plan in row.values()}
    fresh = {key: plan for key, plan in fresh.items() if key not in known}
    if fresh:
        known |= _measure(bench, fresh, prompts)[1]
    return {kind: {n: known[plan.key] for n, plan in row.items()} for kind, row in wanted.items()}


def _measure(
    bench: Bench, candidates: Mapping[str, Candidate], prompts: Sequence[Prompt]
) -> tuple[Measurement, dict[str, HeldOut]]:
    plans = [full_resolution(bench.steps), *candidates.values()]
    fine, *results = bench.confirm(plans, prompts)
    return fine, {
        name: HeldOut(candidate=candidate, result=result)
        for (name, candidate), result in zip(candidates.items(), results, strict=True)
    }


def _share(one: Measurement, other: Measurement) -> float:
    pairs = list(zip(one.similarity, other.similarity, strict=True))
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
