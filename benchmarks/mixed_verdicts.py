"""What is said of mixed plans: each against the closest others that cost no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixed_plans import CONTROL, DYNAMIC, FINE_PLAN, MIXED, ORACLE, STATIC
from records import interval_entry

EQUAL_COST = 1.02
"""A rival may cost 2% more."""
Row = dict[str, Any]


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Every mixed plan against the closest others that cost no more."""
    by_name = {row["name"]: row for row in rows}
    kinds = (MIXED, CONTROL, ORACLE)
    others = [row for row in rows if row["kind"] not in (*kinds, FINE_PLAN)]
    coarse = [row for row in others if row["kind"] in (STATIC, DYNAMIC)]
    found = []
    for row in rows:
        if row["kind"] not in kinds:
            continue
        entry: Row = {"name": row["name"]}
        for key, rivals in (("any", others), ("coarse", coarse)):
            for unit, cost in COSTS.items():
                entry[f"{key}_{unit}"] = best_against(row, rivals, cost)
        control = None
        if row["kind"] == MIXED and row["signal"] is not None:
            control = by_name.get(row["name"].replace(row["signal"], "random"))
        entry["control"] = None if control in (None, row) else against(row, control)
        found.append(entry)
    return found


COSTS: dict[str, Callable[[Row], float]] = {
    "time": lambda row: float(row["loop_ms"]["value"]),
    "tokens": lambda row: float(row["tokens"]),
}


def best_against(row: Row, rivals: Sequence[Row], cost: Callable[[Row], float]) -> Row | None:
    """Against the closest that costs no more; None where there is none."""
    most = cost(row) * EQUAL_COST
    cheap = [one for one in rivals if cost(one) <= most]
    best = max(cheap, key=lambda one: one["psnr"]["value"], default=None)
    return None if best is None else against(row, best)


def against(row: Row, rival: Mapping[str, Any]) -> Row:
    """The difference to a rival, prompt by prompt."""
    pairs = zip(row["psnr_prompts"], rival["psnr_prompts"], strict=True)
    difference = interval_entry([ours - theirs for ours, theirs in pairs])
    low, high = (float(difference[name] or 0) for name in ("low", "high"))
    return {
        "rival": rival["name"],
        "speed": rival["loop_ms"]["value"] / row["loop_ms"]["value"],
        "psnr": difference,
        "holds": "yes" if low > 0 else "no" if high < 0 else "undecided",
    }
