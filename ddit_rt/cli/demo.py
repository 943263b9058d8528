"""`ddit-rt demo`: compile an embedded model and compare plans on a few prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import DEVICES
from ddit_rt.cli.options import folder_to_write, seed, whole
from ddit_rt.sources import EMBEDDED, EMBEDDED_VIDEO, load_pipeline


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--video",
        action="store_true",
        help="videos by the embedded Wan model, instead of images by the embedded FLUX model",
    )
    parser.add_argument(
        "--out",
        type=folder_to_write,
        default=Path("demo_out"),
        metavar="DIR",
        help="folder for grid.png (or clips.mp4), timeline.png and report.json "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--device", choices=("auto", *DEVICES), default="auto", help="default: %(default)s"
    )
    parser.add_argument("--steps", type=whole(1), default=24, help="denoising steps (default: 24)")
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of the first prompt (default: 0)"
    )
    parser.add_argument(
        "--repeats",
        type=whole(1),
        help="timed runs of each image (default: 3) or video (default: 1)",
    )
    parser.add_argument(
        "--keep-artifact",
        action="store_true",
        help="keep the compiled model as DIR/demo.ddit or video.ddit",
    )


def _run(args: argparse.Namespace) -> Outcome:
    from ddit_rt.lab.demo.report import summary_table
    from ddit_rt.lab.demo.run import DemoConfig, run_demo, video_demo

    repeats = args.repeats or (1 if args.video else 3)
    config = (video_demo if args.video else DemoConfig)(
        out=args.out,
        steps=args.steps,
        seed=args.seed,
        repeats=repeats,
        keep_artifact=args.keep_artifact,
    )
    pipeline = load_pipeline(EMBEDDED_VIDEO if args.video else EMBEDDED, device=args.device)
    report = run_demo(pipeline, config)
    drawn = "clips.mp4" if args.video else "grid.png"
    files = f"wrote {args.out / drawn}, timeline.png and report.json beside it"
    return Outcome(data=report, text=f"{summary_table(report)}\n{files}")


DEMO = Command(
    name="demo",
    summary="Compile an embedded demo model and compare patch plans on a few prompts.",
    examples=(
        "ddit-rt demo",
        "ddit-rt demo --video",
        "ddit-rt demo --out /tmp/demo --steps 12 --seed 7",
        "ddit-rt demo --keep-artifact && ddit-rt info demo_out/demo.ddit --model demo",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
