"""Records: the machine that they are of, and the file that one or several calls fill."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tables import TABLES, update_tables
from timing import WARM_UP_CALLS, Deadline, attempt

from ddit_rt.lab.measure.report import machine, versions, write_json
from ddit_rt.lab.measure.statistics import mean_interval

RESULTS = Path(__file__).resolve().parent / "results"

Record = dict[str, Any]
Save = Callable[[Record], None]
"""Takes a record that is not complete yet."""

NO_TIME = "no time was left; call this section alone, or give a larger budget"
"""The error of a record that was not begun."""


def parser_of(document: str | None, out: Path | None = None) -> argparse.ArgumentParser:
    """A parser described by the first line of a script's docstring, with `--out`."""
    parser = argparse.ArgumentParser(description=(document or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=out)
    return parser


def head(**entries: Any) -> Record:
    """What every record begins with, and further entries."""
    return {"schema_version": 1, "machine": machine(), "versions": versions(), **entries}


def machine_entry(device: torch.device) -> dict[str, Any]:
    """The entry `machine`: host, and the GPU if there is one to be used."""
    entry = machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        entry["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            **_driver_entry(device),
        }
    return entry


def _driver_entry(device: torch.device) -> dict[str, str]:
    """Driver, power limit and clock as nvidia-smi tells them; empty where it cannot be asked."""
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = lines.stdout.splitlines()[device.index or 0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip((name.replace(".", "_") for name in fields), values, strict=False))


def resident_bytes(process: int | str = "self") -> int:
    """The resident set of a process."""
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def opened(path: Path, new: Record) -> Record:
    """The report to add to: the one in the file, if there is one.

    Raises:
        ValueError: It is of another machine, model or version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {**new, "sections": {}}
    report: Record = json.loads(path.read_text(encoding="utf-8"))
    stored = identity(report)
    for name, ours in identity(new).items():
        if stored.get(name) != ours:
            raise ValueError(
                f"{path} holds results with {name} {stored.get(name)}, and this run has {ours}; "
                "they do not belong in one file: give another --out, or remove it"
            )
    return {**report, **new}


def identity(report: Record) -> Record:
    """What must agree for results to stand beside each other, as it reads from a file."""
    machine = report["machine"]
    values = {
        "schema_version": report["schema_version"],
        "device": machine["gpu"]["name"] if "gpu" in machine else machine["cpu"],
        **report["versions"],
        **report["model"],
    }
    plain: Record = json.loads(json.dumps(values))
    return plain


def merge(report: Record, section: str, key: str, record: Record) -> None:
    """Puts a record into its place.

    Rows of an earlier call that this one did not run stay, and so does what was measured before and
    failed now, with `latest_error` beside it.
    """
    records = report["sections"].setdefault(section, {})
    before = records.get(key, {})
    merged = kept(before, record)
    rows = dict(before.get("rows", {}))
    for name, row in record.get("rows", {}).items():
        rows[name] = kept(rows.get(name, {}), row)
    records[key] = {**merged, **({"rows": rows} if rows else {})}


def fill(
    report: Record,
    section: str,
    key: str,
    run: Callable[[Save], Record],
    deadline: Deadline,
    args: argparse.Namespace,
) -> None:
    """Runs one measurement into the report and its file, as far as it comes."""

    def save(record: Record) -> None:
        merge(report, section, key, stamped(record, args))
        write_json(args.out, report)

    record, problem = attempt(lambda: run(save)) if deadline.left > 0 else (None, NO_TIME)
    save(record or {"error": problem})


def kept(before: Record, now: Record) -> Record:
    """What was measured before where it failed now, else what it is now."""
    if "error" in now and before and "error" not in before:
        return {**before, "latest_error": now["error"]}
    return now


def stamped(record: Record, args: argparse.Namespace) -> Record:
    """The record with the circumstances of its call."""
    return {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "repeats": args.repeats,
        "warm_up_calls": WARM_UP_CALLS,
        **record,
    }


def interval_entry(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95% interval as strict JSON: the bounds of a single value are null."""
    found = asdict(mean_interval(values))
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def publish(out: Path, report: Record) -> None:
    """Writes a record and, where it is the one that tables are made of, the tables."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    if out.resolve().parent == RESULTS and out.stem in {n.partition(":")[0] for n in TABLES}:
        update_tables(out.stem, report)
    print(f"wrote {out}", file=sys.stderr)
