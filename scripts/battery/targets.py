"""What the battery's results are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Records = Mapping[str, Any]
"""`stages`, `info`, `ops`, `profile`, `flux`, each as its file has it; those that exist."""

Values = Iterator[tuple[str, float]]
"""Cases and their values."""

_SMALL_OP_BYTES = 2**20
_WAITS = ("Synchronize", "Memcpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One bound.

    Attributes:
        name: What is held against it.
        values: Finds the values in the records; none where nothing was measured.
        at_least: Lower bound, or None.
        at_most: Upper bound, or None.
        unit: For people.
    """

    name: str
    values: Callable[[Records], Values]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def met(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    def worst(self, values: list[tuple[str, float]]) -> tuple[str, float]:
        """The case that is furthest to the wrong side."""
        pick = min if self.at_least is not None else max
        return pick(values, key=lambda pair: pair[1])


def _failed_tests(records: Records) -> Values:
    for name, run in records.get("stages", {}).get("tests", {}).get("runs", {}).items():
        yield name, len(run["failed"])


def _sanitizer_errors(records: Records) -> Values:
    for name, tool in records.get("stages", {}).get("sanitize", {}).get("tools", {}).items():
        yield name, float("inf") if tool["errors"] is None else tool["errors"]


def _ops_over_floor(records: Records) -> Values:
    """Large ops only: a small one is bound by its launch."""
    for row in records.get("ops", {}).get("results", ()):
        if "over_floor" in row and row["moved_bytes"] >= _SMALL_OP_BYTES:
            yield f"{row['op']}, {row['size']}", row["over_floor"]


def _rows(records: Records, section: str) -> Iterator[tuple[str, str, Any]]:
    for case, record in records.get("flux", {}).get("sections", {}).get(section, {}).items():
        for name, row in record.get("rows", {}).items():
            yield case, name, row


def _step_over_floor(records: Records) -> Values:
    for case, patch, row in _rows(records, "buckets"):
        if patch != "skip" and "over_floor" in row:
            yield f"{case} {patch}", row["over_floor"]


def _speedup(schedule: str) -> Callable[[Records], Values]:
    def values(records: Records) -> Values:
        for case, name, row in _rows(records, "loops"):
            if name == f"ddit_rt_loop_{schedule}" and "speedup" in row:
                yield case, row["speedup"]

    return values


def _overhead(records: Records) -> Values:
    for case, patch, row in _rows(records, "overhead"):
        form = row.get("executors", {}).get("loop", {})
        if "loop_overhead_share" in form:
            yield f"{case} {patch}", form["loop_overhead_share"]


def _host_waits(records: Records) -> Values:
    for case, patch, row in _rows(records, "overhead"):
        calls = row.get("executors", {}).get("loop", {}).get("host_calls_in_loop")
        if calls is not None:
            waits = (n for name, n in calls.items() if any(word in name for word in _WAITS))
            yield f"{case} {patch}", sum(waits)


def _memory(records: Records) -> Values:
    sections = records.get("flux", {}).get("sections", {})
    for case, record in sections.get("memory", {}).items():
        if "ratio_of_used_bytes" in record:
            yield case, record["ratio_of_used_bytes"]


def _first_image(records: Records) -> Values:
    sections = records.get("flux", {}).get("sections", {})
    for case, record in sections.get("compile", {}).items():
        if "load_to_first_image_seconds" in record:
            yield case, record["load_to_first_image_seconds"]


# Speed-ups are over diffusers eager in the same call, and floors what the bytes or the operations
# take at the rates measured in the same call.
TARGETS = (
    Target(name="failed tests", values=_failed_tests, at_most=0),
    Target(name="errors of the sanitizer", values=_sanitizer_errors, at_most=0),
    Target(
        name="op of 1 MiB or more over its floor", values=_ops_over_floor, at_most=1.5, unit="x"
    ),
    Target(name="step over its floor", values=_step_over_floor, at_most=1.5, unit="x"),
    Target(name="loop, all fine", values=_speedup("fine"), at_least=1.0, unit="x"),
    Target(
        name="loop, the paper's 2.18x plan",
        values=_speedup("paper_2.18x"),
        at_least=2.18,
        unit="x",
    ),
    Target(
        name="loop, the paper's 3.52x plan",
        values=_speedup("paper_3.52x"),
        at_least=3.52,
        unit="x",
    ),
    Target(name="share of the loop beside its model", values=_overhead, at_most=0.02),
    Target(name="waits of the host inside a loop", values=_host_waits, at_most=0),
    Target(name="memory over diffusers", values=_memory, at_most=1.1, unit="x"),
    Target(name="from load to first image", values=_first_image, at_most=30, unit=" s"),
)
