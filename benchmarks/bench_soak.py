"""Whether a process that runs for long grows, slows down, or comes to make other images.

    python benchmarks/bench_soak.py [--runs 2000] [--seed 0] [--minutes 60]
        [--out benchmarks/results/soak_cpu.json] [--notes "what else the machine did"]

One process makes that many runs on the demo model, compiled first: sizes, numbers of images,
policies, step caches, guidance, callbacks and LoRAs as a seed draws them, and one in four is
cancelled, fails or is refused (`soak_runs.py`). At a fixed cadence, after a garbage collection and
without LoRAs, the process is looked at. Some runs are then made again, each in a fresh process.

It ends with 1 where memory, objects, descriptors or threads grew by more than 2% after the warm-up,
an image made again differs in a bit, or a run ended otherwise than was drawn. Latency, and the
number of Python's blocks, are only recorded. No run begins after `--minutes`.

In the record, growth is told `by_windows`, from the median of the first to that of the last fifth
of the looks, and `by_trend`, the rise of the least-squares line; latency is the median of a kind of
runs in the last quarter over that in the first, spread over the kinds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import RESULTS, head, parser_of, publish, resident_bytes
from soak_runs import Run, UnexpectedEnd, perform, schedule, settle, spots, write_loras
from timing import spread

import ddit_rt
from ddit_rt import Engine
from ddit_rt.lab.measure.report import write_json
from ddit_rt.sources import load_pipeline

RESULT = RESULTS / "soak_cpu.json"
LIMIT = 0.02
"""Growth that is none."""
BOUNDED = ("rss_bytes", "live_bytes", "objects", "descriptors", "threads")
UNBOUNDED = ("blocks",)
"""Of a few bytes each, and the log of the runs is among them."""
LEAST = 3
"""Runs of a kind in either quarter, for its latency to count."""


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@dataclass
class Log:
    """What a soak left.

    Attributes:
        samples: The looks at the process.
        seconds: Wall and CPU time of every run.
        digests: Of the images of every run; None of those without.
        surprises: Runs that did not end as was drawn.
    """

    samples: list[dict[str, int]] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    digests: list[str | None] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the soak; 1 where a bound is broken."""
    args = arguments(argv)
    warnings.filterwarnings("ignore", category=UserWarning)  # of plans that have little to choose
    cadence = max(4, args.runs // 100)
    runs = schedule(args.runs, args.seed, cadence)
    if args.again is not None:
        engine, run = load(args.artifact), runs[args.again]
        settle(engine, run, args.loras)
        print(perform(engine, run, args.loras))
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as name:
        folder = Path(name)
        artifact = args.artifact or compiled(folder / "demo.ddit")
        engine = load(artifact)
        assert engine.pipeline is not None
        write_loras(engine.pipeline.transformer, folder)
        log = soak(engine, runs, folder, cadence, args.minutes * 60)
        runs = runs[: len(log.digests)]
        report = summary(runs, log, cadence, args)
        options = ["--runs", str(args.runs), "--seed", str(args.seed)]
        options += ["--artifact", str(artifact), "--loras", str(folder)]
        for run in spots(runs, args.spots, args.seed):
            write_json(args.out, {**report, "broken": broken(report)})  # as far as it has come
            same = again(run, options) == log.digests[run.index]
            entry = {"run": run.index, "kind": run.kind, "loras": run.loras, "equal": same}
            report["spots"].append(entry)
    report["broken"] = broken(report)
    publish(args.out, report)
    for line in report["broken"]:
        print(line, file=sys.stderr)
    return 1 if report["broken"] else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line; the last two are for the processes that make one run again."""
    parser = parser_of(__doc__, RESULT)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="no run begins later")
    parser.add_argument("--spots", type=int, default=10, help="runs to make again")
    parser.add_argument("--notes", default="", help="what else the machine does meanwhile")
    parser.add_argument("--artifact", type=Path, help="the demo's, if it is compiled already")
    parser.add_argument("--again", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--loras", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def compiled(path: Path) -> Path:
    """The demo's artifact, compiled in a process of its own, whose memory is not looked at."""
    command = [sys.executable, "-m", "ddit_rt.cli", "compile", "demo", "-o", str(path)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return path


def load(artifact: Path) -> Engine:
    """The demo's engine."""
    pipeline = load_pipeline("demo")
    pipeline.set_progress_bar_config(disable=True)
    return ddit_rt.load(artifact, pipeline, progress=False)


def soak(engine: Engine, runs: Iterable[Run], folder: Path, cadence: int, limit: float) -> Log:
    """Makes the runs, one after the other, as long as no more than `limit` seconds have passed."""
    log, started = Log(), time.perf_counter()
    for run in runs:
        if time.perf_counter() - started > limit:
            break
        settle(engine, run, folder)
        if run.index % cadence == 0:
            log.samples.append({"run": run.index, **sample()})
            print(log.samples[-1], file=sys.stderr)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            log.digests.append(perform(engine, run, folder))
        except UnexpectedEnd as error:
            print(error, file=sys.stderr)
            log.digests.append(None)
            log.surprises.append(str(error))
        log.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    return log


def sample() -> dict[str, int]:
    """A look at this process."""
    gc.collect()
    read = ctypes.CDLL(None).mallinfo2
    read.restype = _Mallinfo2
    found = read()
    return {
        "rss_bytes": resident_bytes(),
        "live_bytes": found.uordblks + found.hblkhd,
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def again(run: Run, options: Sequence[str]) -> str:
    """What a run gives that is the first of its process."""
    command = [sys.executable, __file__, "--again", str(run.index), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()[-1]


def summary(
    runs: Sequence[Run], log: Log, cadence: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The record, but for the runs that are made again."""
    warm = len(runs) * 15 // 100
    done = [run for run in runs if run.ending == "done"]
    looks = [one for one in log.samples if one["run"] >= warm]
    ratio, cpu_ratio = latency(runs[warm:], log.seconds[warm:])
    outputs = hashlib.sha256("".join(one for one in log.digests if one).encode())
    return {
        **head(notes=args.notes),
        "settings": {
            "runs": len(runs),
            "drawn": args.runs,
            "seed": args.seed,
            "cadence": cadence,
            "warm_up": warm,
        },
        "seconds": sum(wall for wall, _ in log.seconds),
        "cpu_seconds": sum(cpu for _, cpu in log.seconds),
        "endings": Counter(run.ending for run in runs),
        "drawn": {
            "guided": sum(run.guided for run in done),
            "pipeline-driven": sum(run.called_back for run in done),
            "with LoRAs": sum(any(run.loras.values()) for run in done),
        },
        "growth": {name: growth(looks, name) for name in (*BOUNDED, *UNBOUNDED)},
        "latency": {"ratio": ratio, "cpu_ratio": cpu_ratio},
        "spots": [],
        "outputs": outputs.hexdigest(),
        "surprises": log.surprises,
        "samples": log.samples,
    }


def growth(looks: Sequence[Mapping[str, int]], name: str) -> dict[str, float]:
    """How one of the counts went from the first look to the last."""
    values = [look[name] for look in looks]
    window = max(1, len(values) // 5)
    start, end = statistics.median(values[:window]), statistics.median(values[-window:])
    places = [look["run"] for look in looks]
    slope = float(np.polyfit(places, values, 1)[0])
    return {
        "start": start,
        "end": end,
        "by_windows": end / start - 1,
        "by_trend": slope * (places[-1] - places[0]) / start,
    }


def latency(
    runs: Sequence[Run], seconds: Sequence[tuple[float, float]]
) -> list[dict[str, float] | None]:
    """The last quarter over the first by kinds of runs that ended well; of wall and CPU time."""
    quarter = len(runs) // 4
    times: dict[str, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for place, (run, taken) in enumerate(zip(runs, seconds, strict=True)):
        if run.ending == "done" and not quarter <= place < len(runs) - quarter:
            times[run.kind][place >= quarter].append(taken)
    pairs = [both for both in times.values() if min(map(len, both)) >= LEAST]
    if not pairs:
        return [None, None]
    return [
        spread([_median(last, clock) / _median(first, clock) for first, last in pairs])
        for clock in (0, 1)
    ]


def _median(times: Sequence[tuple[float, float]], clock: int) -> float:
    return statistics.median(both[clock] for both in times)


def broken(report: Mapping[str, Any]) -> list[str]:
    """The bounds that do not hold."""
    found = [
        f"{name} grew by {report['growth'][name][way]:.1%} ({way})"
        for name in BOUNDED
        for way in ("by_windows", "by_trend")
        if report["growth"][name][way] > LIMIT
    ]
    return [*report["surprises"], *found] + [
        f"run {spot['run']} is not the same to the bit in a fresh process"
        for spot in report["spots"]
        if not spot["equal"]
    ]


if __name__ == "__main__":
    sys.exit(main())
