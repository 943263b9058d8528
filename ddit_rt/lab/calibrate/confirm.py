"""The decision between the finalists, on prompts that the search never saw."""

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
    all_fine,
    cache_text,
)
from ddit_rt.lab.plans.points import Found, Measurement, Point, Prompt
from ddit_rt.lab.plans.target import SPEEDUP, Target

_SAME = 1e-9
"""Loss of similarity of a rival that makes what all fine makes."""

_RIVALS = (STEPS, STATIC)
_SIMPLEST = (*_RIVALS, *ADAPTIVE)
"""Of plans that serve equally well the simpler one is taken."""

_NAMES = {
    STEPS: "fewer fine steps",
    STATIC: "a static plan",
    CACHED: "fine steps with a step cache",
    DYNAMIC: "a dynamic plan",
    COMBINED: "a dynamic plan with a step cache",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finalist:
    """A plan on the held-out prompts.

    Attributes:
        candidate: The plan.
        result: Its figures.
    """

    candidate: Candidate
    result: Measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """Held-out figures and what they decide.

    Attributes:
        winner: Kind of the winning finalist.
        met: Whether it keeps the target on the held-out prompts, within 10% of cost or 0.02 SSIM.
        fine: All-fine on the held-out prompts.
        finalists: The best plan of each family, by kind.
        equals: Per adaptive finalist, the rivals at the cost that it has on the held-out prompts.
        shares: Per adaptive finalist and rival, the share of held-out prompts on which it
            is more similar than the rival at equal cost; a tie counts half.
        static: The static plan at the cost that the winner has there; None if that won itself, or
            none can be as cheap.
        over_static: The share of held-out prompts on which the winner is more similar than it.
    """

    winner: str
    met: bool
    fine: Measurement
    finalists: Mapping[str, Finalist]
    equals: Mapping[str, Mapping[str, Finalist]]
    shares: Mapping[str, Mapping[str, float]]
    static: Finalist | None
    over_static: float | None

    def speedup(self, finalist: Finalist) -> float:
        """Speed-up over all-fine, measured side by side."""
        return self.fine.cost / finalist.result.cost

    @property
    def verdict(self) -> str:
        """What won, in a sentence."""
        best = self.finalists[self.winner]
        name = _NAMES[self.winner]
        if self.winner == STEPS:
            name = f"{name} ({best.candidate.num_inference_steps})"
        if cache := cache_text(best.candidate.step_cache):
            name = f"{name} ({cache})"
        rivals = [_NAMES[kind] for kind in self.finalists if kind != self.winner]
        listed = " and ".join([", ".join(rivals[:-1]), *rivals[-1:]] if rivals[1:] else rivals)
        over = f", over {listed}" if rivals else ", without a rival"
        missed = "" if self.met else "; it misses the target on the held-out prompts"
        return f"{name} won{over}{missed}"


def confirm(
    bench: Bench,
    found: Mapping[str, Found],
    finalists: Mapping[str, Point],
    prompts: Sequence[Prompt],
    request: Mapping[str, float],
    target: Target,
) -> Confirmation:
    """Measures the finalists side by side with all-fine, and decides.

    What an adaptive plan (dynamic, or with a step cache) costs depends on the prompts. So it wins
    only if it is more similar than every rival (fewer fine steps, static) of the cost that it has
    here, whatever the target allowed. Of several the cheapest wins where similarity is the limit;
    where cost is, their costs still differ, and the one wins that loses the smallest part of the
    similarity that its best rival loses.

    Args:
        bench: Runs plans.
        found: What the search found, by kind.
        finalists: The best points, by kind.
        prompts: Held-out prompts.
        request: What the caller asked for.
        target: The same as a limit on the calibration prompts.
    """
    kinds = [kind for kind in _SIMPLEST if kind in finalists]
    candidates = {kind: finalists[kind].candidate for kind in kinds}
    fine, best = _measure(bench, candidates, prompts)
    if SPEEDUP in request:  # relative to all-fine, which was measured again beside the plans
        target = Target(max_cost=fine.cost / request[SPEEDUP])
    shares = {kind: best[kind].result.cost / fine.cost for kind in kinds}
    adaptive = {kind: shares[kind] for kind in kinds if kind in ADAPTIVE}
    equals = _equals(bench, found, best, adaptive, prompts, _RIVALS)
    winner = _winner(best, equals, target)
    static = None
    if winner == STEPS:
        alone = {STEPS: shares[STEPS]}
        static = _equals(bench, found, best, alone, prompts, (STATIC,))[STEPS].get(STATIC)
    elif winner in ADAPTIVE:
        static = equals[winner].get(STATIC)
    return Confirmation(
        winner=winner,
        met=target.met_on_held_out(best[winner].result),
        fine=fine,
        finalists=best,
        equals=equals,
        shares={
            kind: {name: _share(best[kind].result, equal.result) for name, equal in row.items()}
            for kind, row in equals.items()
        },
        static=static,
        over_static=_share(best[winner].result, static.result) if static else None,
    )


def _winner(
    best: Mapping[str, Finalist], equals: Mapping[str, Mapping[str, Finalist]], target: Target
) -> str:
    """The kind that wins; `best` has the simplest first."""
    rivals = [kind for kind in best if kind in _RIVALS]
    winner = min(rivals or best, key=lambda kind: target.held_out_rank(best[kind].result))
    rivals_miss = not rivals or not target.met_on_held_out(best[winner].result)

    def loss(kind: str) -> float:
        rival = max((equal.result.ssim for equal in equals[kind].values()), default=0.0)
        return (1 - best[kind].result.ssim) / max(1 - rival, _SAME)

    standing = [
        kind
        for kind in equals
        if target.met_on_held_out(best[kind].result) and (rivals_miss or loss(kind) < 1)
    ]
    if target.max_cost is None:
        return min(standing, key=lambda kind: best[kind].result.cost, default=winner)
    return min(standing, key=loss, default=winner)


def _equals(
    bench: Bench,
    found: Mapping[str, Found],
    best: Mapping[str, Finalist],
    shares: Mapping[str, float],
    prompts: Sequence[Prompt],
    rivals: Sequence[str],
) -> dict[str, dict[str, Finalist]]:
    """Rivals at shares of all-fine's cost, those that can be as cheap; by the kind of the share."""
    whole = bench.costs["p"] * bench.steps
    wanted = {
        kind: {
            rival: candidate
            for rival in rivals
            if rival in found
            and (candidate := found[rival].costing(share * whole, bench.costs)) is not None
        }
        for kind, share in shares.items()
    }
    known = {finalist.candidate.key: finalist for finalist in best.values()}
    plans = {plan.key: plan for row in wanted.values() for plan in row.values()}
    fresh = {key: plan for key, plan in plans.items() if key not in known}
    if fresh:
        known |= _measure(bench, fresh, prompts)[1]
    return {kind: {r: known[plan.key] for r, plan in row.items()} for kind, row in wanted.items()}


def _measure(
    bench: Bench, candidates: Mapping[str, Candidate], prompts: Sequence[Prompt]
) -> tuple[Measurement, dict[str, Finalist]]:
    fine, *results = bench.confirm([all_fine(bench.steps), *candidates.values()], prompts)
    return fine, {
        kind: Finalist(candidate=candidate, result=result)
        for (kind, candidate), result in zip(candidates.items(), results, strict=True)
    }


def _share(one: Measurement, other: Measurement) -> float:
    pairs = list(zip(one.similarity, other.similarity, strict=True))
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    return wins / len(pairs)
