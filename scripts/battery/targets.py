"""What the battery's results are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Records = Mapping[str, Any]
"""`stages`, `info`, `ops`, `profile`, `flux`, `wan`, each as its file has it; those that exist."""

Values = Iterator[tuple[str, float]]
"""Cases and their values."""

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


def _op(prefix: str, size: str) -> Callable[[Records], Values]:
    """Ops of one kind at one size, over their byte floor."""

    def values(records: Records) -> Values:
        for row in records.get("ops", {}).get("results", ()):
            wanted = row["op"].startswith(prefix) and row["size"].startswith(size)
            if wanted and "over_floor" in row:
                yield f"{row['op']}, {row['size']}", row["over_floor"]

    return values


def _decide_us(records: Records) -> Values:
    for row in records.get("ops", {}).get("results", ()):
        if row["op"].startswith("decide") and row["size"] == "FLUX 1024" and "microseconds" in row:
            yield row["op"], row["microseconds"]["native"]["median"]


def _rows(records: Records, section: str, model: str = "flux") -> Iterator[tuple[str, str, Any]]:
    for case, record in records.get(model, {}).get("sections", {}).get(section, {}).items():
        for name, row in record.get("rows", {}).items():
            yield case, name, row


def _step_over_floor(*patches: str) -> Callable[[Records], Values]:
    def values(records: Records) -> Values:
        for model in ("flux", "wan"):
            for case, patch, row in _rows(records, "buckets", model):
                if patch in patches and "over_floor" in row:
                    yield f"{model} {case} {patch}", row["over_floor"]

    return values


def _speedup(schedule: str) -> Callable[[Records], Values]:
    def values(records: Records) -> Values:
        for case, name, row in _rows(records, "loops"):
            if name == f"ddit_rt_loop_{schedule}" and "speedup" in row:
                yield case, row["speedup"]

    return values


def _overhead(plan: str) -> Callable[[Records], Values]:
    def values(records: Records) -> Values:
        for case, patch, row in _rows(records, "overhead"):
            form = row.get("executors", {}).get("loop", {})
            if patch == plan and "loop_overhead_share" in form:
                yield f"{case} {patch}", form["loop_overhead_share"]

    return values


def _host_waits(records: Records) -> Values:
    for case, patch, row in _rows(records, "overhead"):
        calls = row.get("executors", {}).get("loop", {}).get("host_calls_in_loop")
        if calls is not None:
            waits = (n for name, n in calls.items() if any(word in name for word in _WAITS))
            yield f"{case} {patch}", sum(waits)


def _launches(records: Records) -> Values:
    for case, patch, row in _rows(records, "overhead"):
        calls = row.get("executors", {}).get("loop", {}).get("host_calls_in_loop")
        if calls is not None:
            yield f"{case} {patch}", calls.get("cudaGraphLaunch", 0)


def _memory(records: Records) -> Values:
    sections = records.get("flux", {}).get("sections", {})
    for case, record in sections.get("memory", {}).items():
        if "ratio_of_used_bytes" in record:
            yield case, record["ratio_of_used_bytes"]


def _compile(records: Records) -> Values:
    sections = records.get("flux", {}).get("sections", {})
    for case, record in sections.get("compile", {}).items():
        if "compile_seconds" in record:
            yield case, record["compile_seconds"]


def _first_image(records: Records) -> Values:
    sections = records.get("flux", {}).get("sections", {})
    for case, record in sections.get("compile", {}).items():
        if "load_to_first_image_seconds" in record:
            yield case, record["load_to_first_image_seconds"]


# Floors are what the bytes or the operations take at the rates measured in the same call: 80% of
# the floor's rate is 1.25 times its time. Speed-ups are over diffusers eager in the same call.
TARGETS = (
    Target(name="failed tests", values=_failed_tests, at_most=0),
    Target(name="errors of the sanitizer", values=_sanitizer_errors, at_most=0),
    Target(
        name="step at p over its floor", values=_step_over_floor("p"), at_most=1 / 0.8, unit="x"
    ),
    Target(
        name="step at 2p or 4p over its floor",
        values=_step_over_floor("2p", "4p"),
        at_most=1 / 0.7,
        unit="x",
    ),
    Target(name="share of the loop beside its model, p", values=_overhead("p"), at_most=0.01),
    Target(name="share of the loop beside its model, 4p", values=_overhead("4p"), at_most=0.03),
    Target(name="waits of the host inside a loop", values=_host_waits, at_most=0),
    Target(name="graph launches of a loop", values=_launches, at_most=1),
    Target(name="memory of all buckets over diffusers", values=_memory, at_most=1.15, unit="x"),
    Target(
        name="packing at Wan 720p over its floor",
        values=_op("pack", "Wan 720p"),
        at_most=1 / 0.7,
        unit="x",
    ),
    Target(
        name="unpacking at Wan 720p over its floor",
        values=_op("unpack", "Wan 720p"),
        at_most=1 / 0.7,
        unit="x",
    ),
    Target(name="update over its floor", values=_op("update", "Wan 7"), at_most=1 / 0.7, unit="x"),
    Target(name="decide at FLUX 1024", values=_decide_us, at_most=15, unit=" us"),
    Target(name="compile", values=_compile, at_most=90, unit=" s"),
    Target(name="from load to first image", values=_first_image, at_most=10, unit=" s"),
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
)
