#!/usr/bin/env python3
"""Train one of the embedded demo models, or the study model of the benchmarks, stage by stage.

Examples:
  python scripts/train_demo.py image all --workers 2           about 100 minutes on two cores
  python scripts/train_demo.py video all                       about 80 minutes on one core
  python scripts/train_demo.py image all --device cuda         the same on a GPU
  python scripts/train_demo.py image transformer --minutes 90  one stage, continued if interrupted
  python scripts/train_demo.py video evaluate                  what the shipped model draws
  python scripts/train_demo.py video all --quick               a smoke run of all stages
  python scripts/train_demo.py scenes all --workers 2          benchmarks/study, about 80 minutes

A stage keeps its checkpoints in the work folder and continues from them; delete a file there to
start that stage afresh. `classifier` is of the image model, whose measure and the video model's are
made with it, and of the study model. `artwork` is of that one alone: npm fetches the drawings of
its scenes. Its autoencoder and transformer begin at the image model's weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_training.artwork import collect
from demo_training.classifier import train_classifier
from demo_training.export import evaluate_pipeline, export
from demo_training.image import ImageKind
from demo_training.kind import Kind
from demo_training.scenes import SceneKind
from demo_training.settings import Settings
from demo_training.text import train_text
from demo_training.transformer import train_transformer
from demo_training.vae import train_vae
from demo_training.video import VideoKind

KINDS = {"image": ImageKind, "video": VideoKind, "scenes": SceneKind}
STAGES = ("artwork", "vae", "text", "transformer", "classifier", "export", "evaluate")
_QUICK_MINUTES = 0.02


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=KINDS, help="which one")
    parser.add_argument("stage", choices=(*STAGES, "all"), help="what to run")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of checkpoints, latents and sample grids (default: demo_out/training_MODEL)",
    )
    parser.add_argument(
        "--export", type=Path, help="folder of the pipeline (default: the package's own)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that draw and train (default: 1)"
    )
    parser.add_argument(
        "--minutes", type=float, help="of training, of the stage vae or transformer"
    )
    parser.add_argument("--steps", type=int, default=24, help="of sampling in 'evaluate'")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the transformer's blocks (default: yes)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a second of each stage, nothing written elsewhere"
    )
    return parser


def run_stage(stage: str, kind: Kind, settings: Settings, args: argparse.Namespace) -> None:
    """Run one stage."""
    if stage in ("vae", "transformer"):
        default = _QUICK_MINUTES if args.quick else kind.minutes[stage]
        minutes = default if args.minutes is None else args.minutes
        (train_vae if stage == "vae" else train_transformer)(kind, settings, minutes)
    elif stage == "evaluate":
        evaluate_pipeline(kind, settings, args.steps)
    else:
        others = {
            "artwork": collect,
            "text": train_text,
            "classifier": train_classifier,
            "export": export,
        }
        others[stage](kind, settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.minutes is not None and args.stage not in ("vae", "transformer"):
        parser.error(f"--minutes is of the stage vae or transformer, not of {args.stage}")
    kind = KINDS[args.model]()
    if args.stage not in (*kind.stages, "all"):
        parser.error(f"{args.model} has the stages {', '.join(kind.stages)}, not {args.stage}")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # the networks are too small for more to pay; see --workers
    work = args.work or Path("demo_out") / f"training_{args.model}"
    if args.quick:
        args.steps, args.compile = 2, False
    settings = Settings(
        work=work,
        export=args.export or (work / "export" if args.quick else kind.folder),
        device=device,
        seed=args.seed,
        workers=args.workers,
        compile=args.compile,
        quick=args.quick,
    )
    for stage in kind.stages if args.stage == "all" else (args.stage,):
        run_stage(stage, kind, settings, args)


if __name__ == "__main__":
    main()
