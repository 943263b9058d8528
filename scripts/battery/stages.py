"""Outcomes of the stages, and what their tools reported, in `stages.json`.

Version 1: `stages`, by name: `outcome` (`passed`, `failed`, `timed out`, `skipped`; `started` until
it ended, also where the whole battery was killed), `seconds`, `limit`, `reason`, `at`, and

- `tests`: `runs` by name of the report: `tests`, `passed`, `skipped`, `failed` (names);
- `sanitize`: `tools` by name: `errors`, null where the tool gave no summary.
"""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
FILE = "stages.json"
STARTED = "started"
OUTCOMES = (STARTED, "passed", "failed", "timed out", "skipped")

_SUMMARY = re.compile(
    r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error"
)


def load_stages(out: Path) -> dict[str, Any]:
    """Stages that have run; empty before the first."""
    path = out / FILE
    if not path.exists():
        return {}
    stages: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return stages


def update_stage(out: Path, stage: str, entry: Mapping[str, Any]) -> None:
    """Adds to what is known of a stage.

    Args:
        out: Folder of the results.
        stage: Its name.
        entry: Fields to set.
    """
    stages = load_stages(out)
    _write(out, {**stages, stage: {**stages.get(stage, {}), **entry}})


def _write(out: Path, stages: Mapping[str, Any]) -> None:
    text = json.dumps({"schema_version": SCHEMA_VERSION, "stages": stages}, indent=1)
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(text + "\n", encoding="utf-8")


def record_outcome(
    out: Path, stage: str, *, outcome: str, seconds: int, limit: int, reason: str
) -> None:
    """Notes that a stage has started, which forgets what it gave before, or how it ended."""
    if outcome == STARTED:
        stages = load_stages(out)
        stages.pop(stage, None)
        _write(out, stages)
    entry = {"outcome": outcome, "seconds": seconds, "limit": limit, "reason": reason}
    update_stage(out, stage, {**entry, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})


def record_tests(out: Path, reports: Iterable[Path]) -> list[str]:
    """Notes what JUnit files say.

    Returns:
        Names of the reports in which no test passed: to skip them all is no success.
    """
    runs = {path.stem: read_junit(path) for path in reports}
    update_stage(out, "tests", {"runs": runs})
    return [name for name, run in runs.items() if not run["passed"]]


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of one JUnit file, and the names of tests that failed."""
    cases = list(ET.parse(path).iter("testcase"))  # noqa: S314 - pytest wrote it just now
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "tests": len(cases),
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
    }


def record_sanitizer(out: Path, logs: Iterable[Path]) -> None:
    """Notes what compute-sanitizer found."""
    tools = {
        path.stem.removeprefix("sanitize-"): {"errors": sanitizer_errors(path.read_text("utf-8"))}
        for path in logs
    }
    update_stage(out, "sanitize", {"tools": tools})


def sanitizer_errors(log: str) -> int | None:
    """Errors that a log's summary counts; None without a summary."""
    found = _SUMMARY.findall(log)
    return sum(int(errors or races) for errors, races in found) if found else None
