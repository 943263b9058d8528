"""The decision between the finalists, on prompts that the search never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddit_rt.calibration.bench import Bench
from ddit_rt.calibration.plans import DYNAMIC, STATIC, STEPS, Candidate, all_fine
from ddit_rt.calibration.points import Measurement, Point, Prompt
from ddit_rt.calibration.search import Found
from ddit_rt.calibration.target import SPEEDUP, Target

_SIMPLEST = (STEPS, STATIC, DYNAMIC)
"""Of plans that serve equally well the simpler one is taken."""

_NAMES = {STEPS: "fewer fine steps", STATIC: "a static plan", DYNAMIC: "a dynamic plan"}


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
        equals: The rivals, at the cost that the dynamic finalist has on the held-out prompts.
        shares: Per rival, the share of held-out prompts on which the dynamic plan's picture is
            more similar than that of the rival at equal cost; a tie counts half.
        static: The static plan at the cost that the winner has there; None if that won itself, or
            none can be as cheap.
        over_static: The share of held-out prompts on which the winner is more similar than it.
    """

    winner: str
    met: bool
    fine: Measurement
    finalists: Mapping[str, Finalist]
    equals: Mapping[str, Finalist]
    shares: Mapping[str, float]
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
        rivals = [_NAMES[kind] for kind in self.finalists if kind != self.winner]
        over = f", over {' and '.join(rivals)}" if rivals else ", without a rival"
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

    What a dynamic plan costs depends on the prompts. So it wins only if it is more similar than
    every rival of the cost that it has here, whatever the target allowed.

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
    rivals = [kind for kind in kinds if kind != DYNAMIC]
    winner = min(rivals or kinds, key=lambda kind: target.held_out_rank(best[kind].result))
    equals: dict[str, Finalist] = {}
    if DYNAMIC in best:
        dynamic = best[DYNAMIC].result
        equals = _equals(bench, found, best, dynamic.cost / fine.cost, prompts, (STEPS, STATIC))
        stands = target.met_on_held_out(dynamic) or not rivals
        beaten = all(dynamic.ssim > equal.result.ssim for equal in equals.values())
        rivals_miss = not target.met_on_held_out(best[winner].result)
        if (stands and beaten) or (stands and rivals_miss):
            winner = DYNAMIC
    static = equals.get(STATIC)
    if winner == STEPS:
        share = best[STEPS].result.cost / fine.cost
        static = _equals(bench, found, best, share, prompts, (STATIC,)).get(STATIC)
    if winner == STATIC:
        static = None
    return Confirmation(
        winner=winner,
        met=target.met_on_held_out(best[winner].result),
        fine=fine,
        finalists=best,
        equals=equals,
        shares={kind: _share(best[DYNAMIC].result, equal.result) for kind, equal in equals.items()},
        static=static,
        over_static=_share(best[winner].result, static.result) if static else None,
    )


def _equals(
    bench: Bench,
    found: Mapping[str, Found],
    best: Mapping[str, Finalist],
    share: float,
    prompts: Sequence[Prompt],
    kinds: Sequence[str],
) -> dict[str, Finalist]:
    """Families at a share of all-fine's cost, those that can be as cheap."""
    limit = share * bench.costs["p"] * bench.steps
    wanted = {
        kind: candidate
        for kind in kinds
        if kind in found and (candidate := found[kind].costing(limit, bench.costs)) is not None
    }
    known = {finalist.candidate.key: finalist for finalist in best.values()}
    fresh = {kind: c for kind, c in wanted.items() if c.key not in known}
    measured = _measure(bench, fresh, prompts)[1] if fresh else {}
    return {kind: measured.get(kind) or known[c.key] for kind, c in wanted.items()}


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
