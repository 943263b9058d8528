"""The search: pure Python against an `Evaluator`, in a closed loop and with equal budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from ddit_rt.lab.calibrate.families import Family
from ddit_rt.lab.calibrate.race import Best, BudgetSpent, Ledger, Race
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.lab.plans.points import Evaluator, Found, Measurement, Prompt
from ddit_rt.lab.plans.target import Target


def search(
    families: Sequence[Family],
    evaluator: Evaluator,
    prompts: Sequence[Prompt],
    *,
    costs: Mapping[str, float],
    targets: Sequence[Target],
    evaluations: int,
) -> dict[str, Found]:
    """Searches every family for every target, with equal budgets.

    Args:
        families: What to search.
        evaluator: Runs plans.
        prompts: Calibration prompts.
        costs: Cost of one step at each patch size.
        targets: The main one first, on which 60% of the budget goes; the rest is shared.
        evaluations: Candidates per family at most; each generates every prompt once.

    Returns:
        By kind of family.
    """

    def measure(candidate: Candidate) -> Measurement:
        return evaluator.evaluate(candidate, prompts)

    found: dict[str, Found] = {}
    for family in families:
        ledger = Ledger(measure=measure, limit=0)
        main: Best | None = None
        for index, target in enumerate(targets):
            share = 0.6 + 0.4 * index / (len(targets) - 1) if len(targets) > 1 else 1
            ledger.limit = max(1, round(evaluations * share))
            race = Race(ledger=ledger, target=target, costs=costs, best=_nearest(ledger, target))
            with suppress(BudgetSpent):
                race.run(family)
            main = main or race.best
        with suppress(BudgetSpent):
            race.spread()
        assert main is not None, "every budget is at least one evaluation"
        points = list(ledger.points.values())
        found[family.kind] = Found(points=points, template=main.template, level=main.level)
    return found


def _nearest(ledger: Ledger, target: Target) -> Best | None:
    """Of what was measured for another target, the level that serves this one best."""
    best: Best | None = None
    for template, levels in ledger.levels.items():
        for level, point in levels.items():
            if best is None or target.better(point, best.point):
                best = Best(template=template, level=level, point=point)
    return best
