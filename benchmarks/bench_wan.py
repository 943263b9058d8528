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
  are that many times fewer, see `flux_plans.py`. `...+teacache`: the same with skipped steps, every
  other step where its size is that of the step before; `mag_cache` is diffusers' own with the steps
  of `fine+teacache`. Which steps reuse on a model depends on its weights, what a step that reuses
  costs does not.
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

from flux_buckets import bucket_steps, step_floor, step_row
from flux_loops import measure_loops
from flux_setup import PATCHES
from real_size import RESULTS, complete, header, parser_of, settings
from records import NO_TIME, Record, merge, opened, stamped, write
from timing import attempt, release, take_turns
from wan_model import PRESETS, WanCase
from wan_setup import WanSetup, all_contenders

from ddit_rt.pipeline.memory import memory_of

SECTIONS = ("buckets", "loops", "memory")
NOTES = (
    "weights are random: times are real, quality is not measured",
    "relative_error is meaningful for schedule 'fine' and for compiled diffusers only",
    "the choices of schedule 'dynamic' are arbitrary",
    (
        "every other step reuses with '+teacache' and in 'mag_cache', about the share of TeaCache "
        "at 0.08 on Wan 2.1 1.3B; which steps those are is arbitrary, what they cost is not"
    ),
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
        setup = WanSetup(
            preset=PRESETS[args.preset],
            artifact=args.artifact or Path(scratch) / "wan.ddit",
            **settings(args),
        )
        report = opened(args.out, header(args.preset, "Wan", setup, NOTES))
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
    parser = parser_of(__doc__ or "", SECTIONS, sorted(PRESETS), "wan-1.3b")
    parser.add_argument("--videos", nargs="+", metavar="HxWxF", help="sizes, such as 480x832x81")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--quick", action="store_true", help="the tiny model, eager, once")
    args = parser.parse_args(argv)
    if args.quick:
        args.preset, args.backend, args.repeats, args.device = "tiny", "eager", 1, "cpu"
        args.out = args.out or RESULTS / "wan_quick.json"
    complete(parser, args, "wan")
    args.steps = args.steps or PRESETS[args.preset].steps[0]
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
