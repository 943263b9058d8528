#!/usr/bin/env python3
"""Records and summary of scripts/gpu_battery.sh, which calls this.

Examples:
  python scripts/gpu_battery_report.py info --out DIR           what this machine has
  python scripts/gpu_battery_report.py tests --out DIR a.xml    counts of JUnit files
  python scripts/gpu_battery_report.py summary --out DIR        one page from all records in DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from battery.machine import describe, problem
from battery.stages import OUTCOMES, record_outcome, record_sanitizer, record_tests
from battery.summary import write_summary


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in (
        ("info", "describe the machine; exit code 1 without a CUDA device"),
        ("record", "note that a stage started, or how it ended"),
        ("tests", "note the results of JUnit files"),
        ("sanitize", "note the summaries of compute-sanitizer's logs"),
        ("summary", "write summary.md"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--out", type=Path, required=True, help="folder of the results")
        if name in ("tests", "sanitize"):
            command.add_argument("files", type=Path, nargs="+")
        if name == "record":
            command.add_argument("--stage", required=True)
            command.add_argument("--outcome", required=True, choices=OUTCOMES)
            command.add_argument("--seconds", type=int, default=0)
            command.add_argument("--limit", type=int, required=True)
            command.add_argument("--reason", default="")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.command == "info":
        return _info(args.out)
    if args.command == "record":
        record_outcome(
            args.out,
            args.stage,
            outcome=args.outcome,
            seconds=args.seconds,
            limit=args.limit,
            reason=args.reason,
        )
    elif args.command == "summary":
        try:
            sys.stdout.write(write_summary(args.out))
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    else:
        return _results(args.command, args.out, args.files)
    return 0


def _results(command: str, out: Path, files: Sequence[Path]) -> int:
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        sys.stderr.write(f"no such file: {', '.join(missing)}\n")
        return 1
    if command == "sanitize":
        record_sanitizer(out, files)
        return 0
    empty = record_tests(out, files)
    if empty:
        sys.stderr.write(f"no test passed in {', '.join(empty)}\n")
    return 1 if empty else 0


def _info(out: Path) -> int:
    record = describe()
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (out / "info.json").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    found = problem(record)
    if found is not None:
        sys.stderr.write(f"{found}\n")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
