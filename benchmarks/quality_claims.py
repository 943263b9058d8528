"""What the tables say of the paper's claims and of the baselines, each by its own interval.

A comparison is made prompt by prompt: the mean over the prompts of the difference in SSIM, with its
95% bootstrap interval. A claim holds where the whole interval is above zero, does not where it is
below, and is undecided in between. Where two rules were to spend equal tokens and do not, nothing
is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from quality_paths import PAPER_TRAINED, PAPER_UNTRAINED, SNR_TRAINED, TRAINING_FREE

from ddit_rt.lab.measure.statistics import mean_interval

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
Comparison = tuple[str, str, str]
"""Claim, and the names of the row that should be better and of the other."""

YES, NO, UNDECIDED, UNEQUAL = "yes", "no", "undecided", "unequal cost"
_EQUAL_SHARE = 0.03


def claims(tables: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One entry per comparison: `claim`, `table`, `better`, `worse`, `difference`, `holds`."""
    found: list[dict[str, Any]] = []
    for name, rows in tables.items():
        by_name = {row["name"]: row for row in rows}
        found += [
            _entry(claim, name, by_name[better], by_name[worse])
            for claim, better, worse in _COMPARISONS[name](by_name)
            if better in by_name and worse in by_name
        ]
    return found


def _entry(claim: str, table: str, better: Row, worse: Row) -> dict[str, Any]:
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


def _order(rows: Rows) -> Iterator[Comparison]:
    for other in (2, 1):
        yield f"order 3 is better than order {other} at equal tokens", "order_3", f"order_{other}"
    yield from _baselines(rows)


def _rho(rows: Rows) -> Iterator[Comparison]:
    for name in rows:
        if name.startswith("rho_") and name != "rho_0.4":
            other = name.removeprefix("rho_")
            yield f"rho 0.4 is better than rho {other} at equal tokens", "rho_0.4", name


def _statistic(_rows: Rows) -> Iterator[Comparison]:
    yield "a quantile is better than the mean at equal tokens", "quantile", "mean"


def _adapters(rows: Rows) -> Iterator[Comparison]:
    for plan in dict.fromkeys(name.partition("/")[0] for name in rows if "/" in name):
        for claim, better, worse in _PATHS:
            yield claim, f"{plan}/{better}", f"{plan}/{worse}"
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


_COMPARISONS: dict[str, Callable[[Rows], Iterator[Comparison]]] = {
    "order": _order,
    "tau": _baselines,
    "rho": _rho,
    "statistic": _statistic,
    "adapters": _adapters,
    "static_dynamic": _baselines,
    "steps": _baselines,
    "video": _baselines,
}
