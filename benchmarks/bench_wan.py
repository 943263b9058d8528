"""Times Wan 2.1 1.3B at its real size with random weights on a GPU, or a small Wan on a CPU.

    python benchmarks/bench_wan.py [--sections buckets loops] [--out FILE] [--quick]

Of the same make as `bench_flux.py`, whose notes on contenders, budgets and files hold here too: one
call of the same pipeline class for all contenders, without text encoder and VAE, always guided, all
reading the same weights; ratios are taken within one call; weights are random, so speed is real and
quality is not. `--quick` runs the tiny model once, to see that the script works.

Schema, version 1, as that of `bench_flux.py` but for:

- `sections.buckets`: rows `p`, `2p`, `4p`; a size that the latent does not offer has none. A step
  is both halves of guidance, as one batch.
- `sections.loops`: `schedule` is `fine`, `dynamic`, or `paper_...`: a fixed plan whose operations
  are that many times fewer, see `flux_plans.py`.
- `memory`: what the engine's state beside the model takes, see `ddit_rt.pipeline.memory`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_flux import NO_TIME, Record, merge, opened, stamped, write
from flux_buckets import bucket_steps, step_floor, step_row
from flux_loops import measure_loops
from flux_setup import PATCHES
from hardware import machine_entry
from timing import Deadline, attempt, release, take_turns
from wan_model import PRESETS, WanCase
from wan_setup import WanSetup, all_contenders

from ddit_rt.demo.report import model_entry, versions
from ddit_rt.pipeline.memory import memory_of

SCHEMA_VERSION = 1
SECTIONS = ("buckets", "loops", "memory")
RESULTS = Path(__file__).resolve().parent / "results"
NOTES = (
    "weights are random: times are real, quality is not measured",
    "relative_error is meaningful for schedule 'fine' and for compiled diffusers only",
    "the choices of schedule 'dynamic' are arbitrary",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and merges their records into the file."""
    args = parse(argv)
    calls: dict[str, Callable[[WanSetup, WanCase], Record]] = {
        "buckets": buckets,
        "loops": lambda setup, case: loops(setup, case, args.contenders),
        "memory": memory,
    }
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as scratch:
        setup = setup_from(args, Path(scratch))
        report = opened(args.out, header(args.preset, setup))
        for section in args.sections:
            for case in cases(args):
                print(f"{section} {case.key}", file=sys.stderr, flush=True)
                run = partial(calls[section], setup, case)
                record, problem = attempt(run) if setup.deadline.left > 0 else (None, NO_TIME)
                merge(report, section, case.key, stamped(record or {"error": problem}, args))
                write(args.out, report)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings, with those that depend on device and preset filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: wan-1.3b on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--videos", nargs="+", metavar="HxWxF", help="sizes, such as 480x832x81")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--contenders", nargs="+", default=["*"], help="patterns of names in loops")
    parser.add_argument("--executors", nargs="+", choices=("auto", "loop", "step", "host"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=480.0, help="no new repeat after this")
    parser.add_argument("--warm-up-limit-s", type=float, default=300.0, help="of one contender")
    parser.add_argument("--backend", choices=("aot", "eager"), default="aot")
    parser.add_argument("--artifact", type=Path, help="loaded if it exists, else compiled to it")
    parser.add_argument("--quick", action="store_true", help="the tiny model, eager, once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.quick:
        args.preset, args.backend, args.repeats, args.device = "tiny", "eager", 1, "cpu"
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(f"got --device {args.device}, but torch sees no CUDA device")
    args.preset = args.preset or ("wan-1.3b" if cuda else "small")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.steps = args.steps or PRESETS[args.preset].steps[0]
    args.executors = args.executors or (["loop", "step", "host"] if cuda else ["auto"])
    name = f"wan_{'quick' if args.quick else torch.device(args.device).type}.json"
    args.out = args.out or RESULTS / name
    return args


def cases(args: argparse.Namespace) -> list[WanCase]:
    """Sizes of the run.

    Raises:
        ValueError: A size that cannot be read.
    """
    videos = PRESETS[args.preset].videos
    if args.videos:
        videos = tuple(video_size(text) for text in args.videos)
    return [
        WanCase(height=height, width=width, num_frames=frames, batch=1, steps=args.steps)
        for height, width, frames in videos
    ]


def video_size(text: str) -> tuple[int, int, int]:
    """`"480x832x81"` as numbers."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"got the size {text!r}; write height x width x frames, as 480x832x81")
    height, width, frames = map(int, parts)
    return height, width, frames


def setup_from(args: argparse.Namespace, scratch: Path) -> WanSetup:
    """What all sections share; nothing is built yet."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    return WanSetup(
        preset=PRESETS[args.preset],
        device=device,
        dtype=getattr(torch, args.dtype),
        artifact=args.artifact or scratch / "wan.ddit",
        backend=args.backend,
        repeats=args.repeats,
        deadline=Deadline(args.budget_s),
        warm_up_limit=args.warm_up_limit_s,
        executors=tuple(args.executors),
    )


def header(preset: str, setup: WanSetup) -> Record:
    """All but the sections."""
    transformer = setup.pipeline.transformer
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine_entry(setup.device),
        "versions": versions(),
        "model": {
            "preset": preset,
            **model_entry("Wan, random weights", transformer),
            "weight_bytes": sum(parameter.nbytes for parameter in transformer.parameters()),
            "text_tokens": setup.preset.text_tokens,
            "config": dict(setup.preset.config),
        },
        "notes": list(NOTES),
    }


def buckets(setup: WanSetup, case: WanCase) -> Record:
    """One step at each patch size that the latent offers, in turns, against its floor."""
    costs, limits = setup.costs(case), setup.rates
    release()
    setup.engine_error()  # compiled before, not inside, the warm-up of a contender
    measured = take_turns(
        {patch: partial(bucket_steps, setup, case, patch) for patch in PATCHES if patch in costs},
        repeats=setup.repeats,
        device=setup.device,
        deadline=setup.deadline,
        warm_up_limit=setup.warm_up_limit,
    )
    rows: dict[str, Any] = {}
    for patch, own in measured.items():
        if own.error is not None or not own.results:
            rows[patch] = {"error": own.error or "no round was run"}
        else:
            rows[patch] = step_row(own.results, step_floor(setup, costs[patch]))
    return {"rates": limits, "rows": rows}


def loops(setup: WanSetup, case: WanCase, patterns: Sequence[str] = ("*",)) -> Record:
    """The whole loop: contenders whose names match a pattern, and always the baseline."""
    return measure_loops(setup, case, all_contenders, patterns)


def memory(setup: WanSetup, case: WanCase) -> Record:
    """Bytes of the engine's state beside the model."""
    problem = setup.engine_error()
    if problem is not None:
        raise RuntimeError(f"no engine: {problem}")
    size = {"height": case.height, "width": case.width, "num_frames": case.num_frames}
    return asdict(memory_of(setup.engine.artifact, setup.pipeline, case.steps, **size))


if __name__ == "__main__":
    sys.exit(main())
