#!/usr/bin/env python3
"""Puts the outcome of one run of the tests into docs/matrix.md; scripts/matrix.sh calls this.

The Python that ran the tests must run this too: the versions in the row are its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_visit import outcomes_of

PACKAGES = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
COLUMNS = (
    *("combination", "date", "Python", "torch", *PACKAGES),
    *("passed", "skipped", "failed", "seconds", "CPU"),
)
INTRODUCTION = """# Versions that the tests ran under

Written by `scripts/matrix.sh`; a row is the newest outcome of a combination. All tests but those
that need a GPU; a test that needs more than the machine has is skipped and says why. `default` is
what `scripts/setup.sh` installs. Seconds are of the whole run on that CPU, whatever else it did.
"""


def outcome(combination: str, report: Path) -> dict[str, str]:
    """The row, by column, of a run under this Python.

    Args:
        combination: What was asked for.
        report: The run's JUnit file.

    Raises:
        ValueError: No test stands in the report.
    """
    fates = [fate for _, fate in outcomes_of(report)]
    if not fates:
        raise ValueError(f"{report} holds no test: it is no outcome")
    (suite,) = ET.parse(report).iter("testsuite")  # noqa: S314 - pytest wrote it just now
    values = {
        "combination": combination,
        "date": time.strftime("%Y-%m-%d", time.gmtime(report.stat().st_mtime)),
        "Python": platform.python_version(),
        **{name: _version(name) for name in ("torch", *PACKAGES)},
        **{fate: fates.count(fate) for fate in ("passed", "skipped", "failed")},
        "seconds": round(float(suite.attrib["time"])),
        "CPU": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
    }
    return {column: str(values[column]).replace("|", "/") for column in COLUMNS}


def updated(page: str, row: Mapping[str, str]) -> str:
    """The page with this row in the place of its combination's last one.

    Args:
        page: What it says now; empty for a new one.
        row: A value for each of `COLUMNS`.

    Raises:
        ValueError: The page has other columns.
    """
    header = [_line(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines = [line for line in page.splitlines() if line.startswith("|")]
    if lines and lines[:2] != header:
        raise ValueError(f"the table begins with {lines[:2]}, expected {header}: remove the page")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    rows[row["combination"]] = _line([row[column] for column in COLUMNS])
    return "\n".join([INTRODUCTION, *header, *(rows[name] for name in sorted(rows)), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _version(package: str) -> str:
    if package == "torch":
        import torch

        return str(torch.__version__)  # with its kind of build, which the metadata may leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--combination", required=True, help="what was asked for")
    parser.add_argument("--junit", type=Path, required=True, help="report of the run")
    parser.add_argument("--table", type=Path, required=True, help="page to update")
    args = parser.parse_args(argv)
    page = args.table.read_text(encoding="utf-8") if args.table.exists() else ""
    try:
        row = outcome(args.combination, args.junit)
        page = updated(page, row)
    except ValueError as error:
        sys.exit(f"{args.table}: {error}")
    args.table.parent.mkdir(exist_ok=True)
    args.table.write_text(page, encoding="utf-8")
    print(_line([row[column] for column in COLUMNS]))  # noqa: T201


if __name__ == "__main__":
    main()
