"""The ablations: which plans stand in which table of `bench_quality.py`, and what they say.

A claim compares two rows prompt by prompt: by the mean difference in SSIM with its 95% bootstrap
interval. It holds where the whole interval is above zero, does not where it is below, and is
undecided in between. Where two rules were to spend equal tokens and do not, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from quality_paths import (
    LABELS,
    PAPER_TRAINED,
    PAPER_UNTRAINED,
    SNR_TRAINED,
    TRAINING_FREE,
)
from quality_rows import Row
from quality_runs import MEAN, Plan, reference
from quality_search import MakePolicy, Matcher

from ddit_rt.lab.measure.statistics import mean_interval
from ddit_rt.lab.plans.genome import Static
from ddit_rt.policies import DDiTPolicy, StaticPolicy

ADAPTERS = "adapters"
PAPER_TAU, PAPER_RHO = 1e-3, 0.4
YES, NO, UNDECIDED, UNEQUAL = "yes", "no", "undecided", "unequal cost"
_EQUAL_SHARE = 0.03

Rows = Mapping[str, Row]
Comparison = tuple[str, str, str]
"""Claim, and the names of the row that should be better and of the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Values that the tables go through.

    Attributes:
        taus: Of the paper's rule, as they are.
        rhos: Quantiles, `PAPER_RHO` among them.
        shares: Token shares at which dynamic and static plans are compared.
        step_counts: Denoising steps.
    """

    taus: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2)
    rhos: tuple[float, ...] = (0.1, 0.25, PAPER_RHO, 0.6, 0.9)
    shares: tuple[float, ...] = (0.65, 0.5, 0.35)
    step_counts: tuple[int, ...] = (12, 28, 50)


QUICK_GRID = Grid(taus=(PAPER_TAU,), rhos=(0.25, PAPER_RHO), shares=(0.6,), step_counts=(5, 7))


def paper_rule(tau: float, *, rho: float = PAPER_RHO, order: int = 3) -> DDiTPolicy:
    """The paper's rule; three warm-up steps at any order, so that only the difference differs."""
    return replace(DDiTPolicy.paper(tau, rho), order=order, warmup_steps=3)


def default_rule(tau: float) -> DDiTPolicy:
    """The product's rule. 4p has half the tau of 2p, at which the two err about as much."""
    return DDiTPolicy(tau={"2p": tau, "4p": tau / 2}, criterion="raw")


def _order(matcher: Matcher, _grid: Grid) -> list[Row]:
    rows = [
        matcher.matched(f"order_{order}", f"order {order}", partial(paper_rule, order=order))
        for order in (1, 2, 3)
    ]
    return [*rows, *matcher.static_of(rows[-1])]


def _tau(matcher: Matcher, grid: Grid) -> list[Row]:
    rows: list[Row] = []
    for tau in grid.taus:
        row = matcher.row(f"tau_{tau:g}", f"tau {tau:g}", "dynamic", paper_rule(tau))
        rows += [row, *matcher.static_of(row)]
    return rows


def _rho(matcher: Matcher, grid: Grid) -> list[Row]:
    rows = {
        rho: matcher.matched(f"rho_{rho:g}", f"rho {rho:g}", partial(paper_rule, rho=rho))
        for rho in grid.rhos
    }
    return [*rows.values(), *matcher.static_of(rows[PAPER_RHO])]


def _statistic(matcher: Matcher, _grid: Grid) -> list[Row]:
    quantile = matcher.matched("quantile", f"quantile {PAPER_RHO:g}", paper_rule)
    mean = replace(matcher, statistic=MEAN).matched("mean", "mean", paper_rule)
    return [quantile, mean, *matcher.static_of(quantile)]


def _adapters(matcher: Matcher, _grid: Grid) -> list[Row]:
    judge, steps = matcher.judge, matcher.steps
    return [
        judge.row(
            f"{key}/{path}",
            f"{label}: {title}",
            "static",
            Plan(policy=policy, num_inference_steps=steps, path=path),
            steps,
        )
        for key, label, policy in adapter_plans(steps)
        for path, title in LABELS.items()
        if path in judge.runs.paths
    ]


def adapter_plans(steps: int) -> list[tuple[str, str, StaticPolicy]]:
    """Static plans that the coarse steps are compared on: key, label, policy."""
    policy = StaticPolicy(Static(count=steps, sizes=("2p",)).plan(steps))
    coarse = round(0.6 * steps)
    later = ["p"] * 3 + ["2p"] * coarse + ["p"] * (steps - 3 - coarse)
    return [
        ("2p_40", "2p for 40%", StaticPolicy("2p:0.4,p")),
        ("2p_60", "2p for 60%", StaticPolicy("2p:0.6,p")),
        ("3_then_2p_60", "2p for 60%, after three steps at p", StaticPolicy(later[:steps])),
        ("2p_80", "2p for 80%", StaticPolicy("2p:0.8,p")),
        ("4p_20_2p_60", "4p for 20%, 2p to 60%", StaticPolicy("4p:0.2,2p:0.4,p")),
        ("interleaved", "2p, every fourth step at p", policy),
    ]


def _static_dynamic(matcher: Matcher, grid: Grid) -> list[Row]:
    rows: list[Row] = []
    for share in grid.shares:
        own = replace(matcher, share=share)
        for key, label, make in _RULES:
            row = own.matched(f"{key}_{share:g}", f"{label}, {share:.0%}", make)
            rows += [row, *own.static_of(row)]
    return rows


_RULES: tuple[tuple[str, str, MakePolicy], ...] = (
    ("paper", "dynamic, the paper's rule", paper_rule),
    ("default", "dynamic, default rule", default_rule),
)


def _steps(matcher: Matcher, grid: Grid) -> list[Row]:
    judge, most = matcher.judge, max(grid.step_counts)
    rows: list[Row] = []
    for count in grid.step_counts:
        own = replace(matcher, steps=count)
        paper = own.row(
            f"paper_{count}",
            f"{count} steps, the paper's rule at its tau",
            "dynamic",
            paper_rule(PAPER_TAU),
        )
        row = own.matched(f"default_{count}", f"{count} steps, dynamic, default rule", default_rule)
        rows += [paper, row, *own.static_of(row)]
    between = [
        judge.row(
            f"{n}_of_{most}", f"{n} fine steps against {most}", "reference", reference(n), most
        )
        for n in grid.step_counts
        if n < most
    ]
    return [*rows, *between]


TABLES: dict[str, Callable[[Matcher, Grid], list[Row]]] = {
    "order": _order,
    "tau": _tau,
    "rho": _rho,
    "statistic": _statistic,
    ADAPTERS: _adapters,
    "static_dynamic": _static_dynamic,
    "steps": _steps,
}


def claims(tables: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One entry per comparison: `claim`, `table`, `better`, `worse`, `difference`, `holds`."""
    found: list[dict[str, Any]] = []
    for name, rows in tables.items():
        by_name = {row["name"]: row for row in rows}
        found += [
            _claim(claim, name, by_name[better], by_name[worse])
            for claim, better, worse in _comparisons(name, by_name)
            if better in by_name and worse in by_name
        ]
    return found


def _claim(claim: str, table: str, better: Row, worse: Row) -> dict[str, Any]:
    """Whether the first row's images have a higher fidelity than the second's."""
    pairs = zip(better["ssim_per_prompt"], worse["ssim_per_prompt"], strict=True)
    difference = mean_interval([own - other for own, other in pairs])
    holds = YES if difference.low > 0 else NO if difference.high < 0 else UNDECIDED
    matched = "target_share" in better and "target_share" in worse
    if matched and abs(better["tokens_share"] - worse["tokens_share"]) > _EQUAL_SHARE:
        holds = UNEQUAL
    return {
        "claim": claim,
        "table": table,
        "better": better["name"],
        "worse": worse["name"],
        "difference": asdict(difference),
        "holds": holds,
    }


def _comparisons(table: str, rows: Rows) -> Iterator[Comparison]:
    """What may be claimed of a table; some rows may not be in it."""
    for other in (2, 1):
        yield f"order 3 is better than order {other} at equal tokens", "order_3", f"order_{other}"
    for name in rows:
        if name.startswith("rho_") and name != "rho_0.4":
            rho = name.removeprefix("rho_")
            yield f"rho 0.4 is better than rho {rho} at equal tokens", "rho_0.4", name
    yield "a quantile is better than the mean at equal tokens", "quantile", "mean"
    for plan in dict.fromkeys(name.partition("/")[0] for name in rows if "/" in name):
        for claim, better, worse in _PATHS:
            yield claim, f"{plan}/{better}", f"{plan}/{worse}"
    if table not in ("rho", "statistic"):  # variants of one rule, which is in the other tables
        yield from _baselines(rows)


_PATHS = (
    (
        "SNR-matched is better than the paper's initialisation, both untrained",
        TRAINING_FREE,
        PAPER_UNTRAINED,
    ),
    ("training makes the paper's adapters better", PAPER_TRAINED, PAPER_UNTRAINED),
    ("training makes the SNR-matched step better", SNR_TRAINED, TRAINING_FREE),
    (
        "the paper's trained adapters are better than the SNR-matched step without training",
        PAPER_TRAINED,
        TRAINING_FREE,
    ),
    (
        "SNR-matched is better than the paper's adapters, both trained",
        SNR_TRAINED,
        PAPER_TRAINED,
    ),
)


def _baselines(rows: Rows) -> Iterator[Comparison]:
    """Every plan against fewer steps, and every dynamic one against its static baseline."""
    for name, row in rows.items():
        kind = row["kind"]
        if "static" in row:
            yield f"a {kind} plan is better than a static one at equal time", name, row["static"]
        for cost, baseline in row.get("fewer_steps", {}).items():
            words = cost.replace("_", " ")
            yield f"a {kind} plan is better than fewer steps at {words}", name, baseline
