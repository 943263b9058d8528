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
- `memory`: what the engine's state beside the model takes, see `ddit_rt.engine.memory`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from flux_buckets import measure_steps
from flux_loops import measure_loops
from real_size import RESULTS, complete, header, parser_of, settings
from records import Record, Save, fill, opened
from wan_model import PRESETS, WanCase
from wan_setup import WanSetup, all_contenders

from ddit_rt.engine.memory import memory_of

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
    calls: dict[str, Callable[[WanSetup, WanCase, Save], Record]] = {
        # One step at each patch size that the latent offers, in turns, against its floor.
        "buckets": lambda setup, case, save: measure_steps(setup, case, {}, save),
        "loops": lambda setup, case, save: measure_loops(
            setup, case, all_contenders, args.contenders, save
        ),
        "memory": lambda setup, case, _: memory(setup, case),
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
                fill(report, section, case.key, run, setup.deadline, args)
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


def memory(setup: WanSetup, case: WanCase) -> Record:
    """Bytes of the engine's state beside the model."""
    problem = setup.engine_error()
    if problem is not None:
        raise RuntimeError(f"no engine: {problem}")
    size = {"height": case.height, "width": case.width, "num_frames": case.num_frames}
    return asdict(memory_of(setup.engine.artifact, setup.pipeline, case.steps, **size))


if __name__ == "__main__":
    sys.exit(main())
