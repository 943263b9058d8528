#!/usr/bin/env python3
"""Train the embedded video model, stage by stage.

Examples:
  python scripts/train_video_model.py all                       everything, about 80 min on one core
  python scripts/train_video_model.py transformer --minutes 60  one stage, continued if interrupted
  python scripts/train_video_model.py export                    the last checkpoint, as shipped
  python scripts/train_video_model.py evaluate                  what the shipped model draws

A stage keeps its checkpoints in the work folder and continues from them; delete a file there to
start that stage afresh.
"""

import argparse
import pathlib

import torch
from demo_training.settings import Settings

STAGES = ("text", "vae", "transformer", "export", "evaluate")
_VAE_MINUTES, _TRANSFORMER_MINUTES = 20.0, 52.0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"), help="what to run")
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("demo_out/video_training"),
        help="folder of checkpoints, latents and sample grids (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (default: 1)")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"of CPU time: vae (default {_VAE_MINUTES:.0f}), "
        f"transformer (default {_TRANSFORMER_MINUTES:.0f})",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the transformer's blocks (default: yes)",
    )
    return parser


def run_stage(stage: str, minutes: float | None, settings: Settings) -> None:
    """Run one stage."""
    if stage == "vae":
        from video_training.vae import train_vae

        train_vae(settings, minutes or _VAE_MINUTES)
    elif stage == "text":
        from video_training.text import train_text

        train_text(settings)
    elif stage == "transformer":
        from video_training.transformer import train_transformer

        train_transformer(settings, minutes or _TRANSFORMER_MINUTES)
    elif stage == "evaluate":
        from video_training.evaluate import evaluate

        evaluate()
    else:
        from video_training.export import export_pipeline

        export_pipeline(settings)


def main() -> None:
    """Entry point."""
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.minutes is not None and arguments.stage not in ("vae", "transformer"):
        parser.error(f"--minutes is of the stage vae or transformer, not of {arguments.stage}")
    # One thread a process: the networks are too small for more to pay.
    torch.set_num_threads(1)
    settings = Settings(
        work=arguments.work,
        device=arguments.device,
        seed=arguments.seed,
        workers=arguments.workers,
        compile=arguments.compile,
    )
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        run_stage(stage, arguments.minutes, settings)


if __name__ == "__main__":
    main()
