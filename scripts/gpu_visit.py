#!/usr/bin/env python3
"""The parts of scripts/gpu_battery.sh that are easier said in Python; it calls this.

Commands:
  card                          a short name of the device, for names of files
  form STEPS.jsonl --junit XML  the fastest form of the executor whose rules hold
  bench OUT.json --model flux   a benchmark, which fails unless it has a good row
  summary DIR                   one page from all records in DIR
  size WHEELS --limit-mib 64    bytes of the checkout and of the wheels that travel with it
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]

_STACKS_S = 45

# What a form rests on, by the tests of tests/runtime/test_step_gpu.py.
ALONE = "test_kernels_have_the_bits_of_the_cpu_ops"
SWITCH = "test_switch_runs_the_body_of_the_bucket"
LOOP = (
    "test_while_runs_every_step_once",
    "test_attention_in_a_body_has_the_bits_of_a_replay[cudnn]",
    "test_attention_in_a_body_has_the_bits_of_a_replay[flash]",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("card").set_defaults(run=_card)
    form = commands.add_parser("form")
    form.add_argument("steps", type=Path)
    form.add_argument("--junit", type=Path, required=True)
    form.add_argument("--device", default="cuda")
    form.set_defaults(run=_form)
    bench = commands.add_parser("bench")
    bench.add_argument("out", type=Path)
    bench.add_argument("--model", choices=("flux", "wan"), required=True)
    bench.set_defaults(run=_bench)
    summary = commands.add_parser("summary")
    summary.add_argument("out", type=Path)
    summary.set_defaults(run=lambda args, _: sys.stdout.write(write_summary(args.out)) and 0)
    size = commands.add_parser("size")
    size.add_argument("wheels", type=Path)
    size.add_argument("--limit-mib", type=float, required=True)
    size.set_defaults(run=_size)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unknown arguments {rest}")
    run: Callable[[argparse.Namespace, list[str]], int] = args.run
    return run(args, rest)


def _card(_args: argparse.Namespace, _rest: list[str]) -> int:
    import torch

    from ddit_rt import _runtime

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    build = dict(_runtime.build_info())
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "card": name}
    sys.stderr.write(f"{versions} {build}\n")
    short = re.sub(r"[^a-z0-9]+", "_", name.lower().replace("nvidia", "")).strip("_")
    sys.stdout.write(f"{short}\n")
    return 0


def _form(args: argparse.Namespace, _rest: list[str]) -> int:
    """Prints the form and notes it, with the tests that failed, in the steps."""
    if args.junit.exists():
        outcomes = dict(outcomes_of(args.junit))
        entry = {
            "step": "form",
            "form": form_of(outcomes) if args.device == "cuda" else "auto",
            "passed": sum(outcome == "passed" for outcome in outcomes.values()),
            "failed": [name for name, outcome in outcomes.items() if outcome == "failed"],
        }
        with args.steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    # Of an earlier call, where this one did not try the rules.
    known = [entry["form"] for entry in steps_of(args.steps) if entry["step"] == "form"]
    sys.stdout.write(f"{known[-1] if known else 'host'}\n")
    return 0


def outcomes_of(junit: Path) -> list[tuple[str, str]]:
    """Name and `passed`, `skipped` or `failed` of every test of a JUnit file; none if cut off."""
    fates = {"skipped": "skipped", "failure": "failed", "error": "failed"}
    try:
        cases = list(ET.parse(junit).iter("testcase"))  # noqa: S314 - pytest wrote it just now
    except ET.ParseError:
        return []
    return [
        (
            str(case.get("name")),
            next((fates[child.tag] for child in case if child.tag in fates), "passed"),
        )
        for case in cases
    ]


def form_of(outcomes: Mapping[str, str]) -> str:
    """The fastest form of which the parts passed; `eager` where the kernels alone are wrong."""
    alone = [outcome for name, outcome in outcomes.items() if name.startswith(ALONE)]
    if "failed" in alone:
        return "eager"
    if outcomes.get(SWITCH) != "passed":
        return "host"
    # An attention that this machine lacks is skipped, and cannot be what the blocks use.
    loops = all(outcomes.get(name) in ("passed", "skipped") for name in LOOP)
    return "loop" if loops and outcomes.get(LOOP[0]) == "passed" else "step"


def _bench(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs `bench_real_size.py`; fails unless its section has a good row."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    bench = import_module("bench_real_size")
    # What a call was at when its time ended must be in the log: there is no second one.
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("ddit_rt").setLevel(logging.DEBUG)
    # `timeout` ends what hangs in C with the GIL held, where the thread below cannot look.
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)
    threading.Thread(target=_tell_stacks, daemon=True).start()
    bench.main(["--model", args.model, *rest, "--out", str(args.out)])
    section = rest[rest.index("--sections") + 1]
    cases = json.loads(args.out.read_text(encoding="utf-8"))["sections"][section].values()
    rows = [row for case in cases for row in case.get("rows", {"": case}).values()]
    good = [row for row in rows if "error" not in row and "latest_error" not in row]
    if not good:
        sys.stderr.write(f"no good row: {[row.get('error', row) for row in rows]}\n")
    return 0 if good else 1


def _tell_stacks() -> None:
    """Writes what every other thread is at, again and again.

    With the GIL held: `faulthandler.dump_traceback_later` reads frames while they change, and can
    end the process that it watches.
    """
    while True:
        time.sleep(_STACKS_S)
        for thread, frame in sys._current_frames().items():  # noqa: SLF001
            if thread != threading.get_ident():
                stack = "".join(traceback.format_stack(frame))
                sys.stderr.write(f"thread {thread} is at, latest call last:\n{stack}")


def steps_of(path: Path) -> list[Record]:
    """Lines of `steps.jsonl`."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_summary(out: Path) -> str:
    """Writes `summary.md`: steps, targets and tables of all records; returns its text."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    tables = import_module("made_tables.real_size")
    lines = ["# GPU battery", "", "| step | exit | seconds |", "|---|---|--:|"]
    for entry in steps_of(out / "steps.jsonl"):
        if "seconds" in entry:
            lines.append(f"| {entry['step']} | {entry['code']} | {entry['seconds']} |")
        elif entry["step"] == "form":
            failed = ", ".join(entry["failed"]) or "none"
            lines.append(f"| rules: form {entry['form']}, failed: {failed} | | |")
    for path in sorted([*out.glob("flux*.json"), *out.glob("wan*.json")]):
        report = json.loads(path.read_text(encoding="utf-8"))
        lines += ["", f"## {path.stem}", "", tables.real_size(report)]
        lines += [f"- {name}: {value:.3g}, aim {aim}" for name, value, aim in targets(report)]
        lines += [f"- not measured: {place}: {error}" for place, error in errors(report, "")]
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def targets(report: Record) -> Iterator[tuple[str, float, str]]:
    """What the product is held against: name, value and bound."""
    for section, cases in report["sections"].items():
        for case, record in cases.items():
            for name, row in record.get("rows", {}).items():
                if "over_floor" in row and name != "skip":
                    aim = "<= 1.25" if name == "p" else "<= 1.43"
                    yield f"{case} {name}, step over its floor", row["over_floor"], aim
                if "speedup" in row and name.startswith("ddit_rt"):
                    yield f"{case} {name}, over diffusers eager", row["speedup"], _least(name)
                calls = row.get("host_calls_in_loop")
                if calls is not None:
                    waits = sum(n for call, n in calls.items() if "Synchronize" in call)
                    yield f"{case} {name}, waits of the host in a loop", waits, "0"
                    launches = calls.get("cudaGraphLaunch", 0)
                    yield f"{case} {name}, graph launches of a loop", launches, "1 (form loop)"
            if section == "compile" and "compile_seconds" in record:
                yield f"{case}, compile in s", record["compile_seconds"], "<= 90"
                first = record["load_to_first_image_seconds"]
                yield f"{case}, load to first image in s", first, "<= 10"


def _least(name: str) -> str:
    planned = re.search(r"paper_([\d.]+)x", name)
    return f">= {planned[1] if planned else '1'}"


def errors(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every `error` in nested records, with where it stands."""
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        if name.endswith("error") and isinstance(inner, str):
            yield place, " ".join(inner.split())[:300]
        else:
            yield from errors(inner, f"{place} {name}".strip())


def _size(args: argparse.Namespace, _rest: list[str]) -> int:
    """Refuses a checkout that is too large to travel with its wheels."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    files = {ROOT / name for name in names.split("\0") if name}
    tree = sum(file.stat().st_size for file in files if file.is_file())
    wheels = {wheel.name: wheel.stat().st_size for wheel in sorted(args.wheels.glob("*.whl"))}
    total = tree + sum(wheels.values())
    for name, size in {"checkout": tree, **wheels, "together": total}.items():
        sys.stdout.write(f"{size / 2**20:6.1f} MiB  {name}\n")
    if not any(name.startswith("ddit_rt-") for name in wheels):
        sys.stderr.write(f"no wheel of ddit_rt in {args.wheels}: the machine will build one\n")
    if total > args.limit_mib * 2**20:
        sys.stderr.write(f"too large: {total / 2**20:.1f} of {args.limit_mib:g} MiB\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
