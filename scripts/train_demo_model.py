#!/usr/bin/env python3
"""Train the embedded demo model, stage by stage.

Examples:
  python scripts/train_demo_model.py all                       everything, ~100 minutes on 2 cores
  python scripts/train_demo_model.py all --device cuda         the same on a GPU
  python scripts/train_demo_model.py transformer --minutes 90  one stage, continued if interrupted
  python scripts/train_demo_model.py evaluate --count 64       accuracy of the shipped model

A stage keeps its checkpoints in the work folder and continues from them; delete a file there to
start that stage afresh.
"""

import argparse
import pathlib

import torch
from demo_training.classifier import train_classifier
from demo_training.export import evaluate_pipeline, export_pipeline
from demo_training.settings import Settings
from demo_training.text import train_text
from demo_training.transformer import train_transformer
from demo_training.vae import train_vae

STAGES = ("vae", "text", "transformer", "classifier", "export", "evaluate")
_VAE_MINUTES, _TRANSFORMER_MINUTES = 15.0, 66.0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"), help="what to run")
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("demo_out/training"),
        help="folder of checkpoints, latents and sample grids (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that draw and train (default: 2)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"of training: vae (default {_VAE_MINUTES:.0f}), "
        f"transformer (default {_TRANSFORMER_MINUTES:.0f})",
    )
    parser.add_argument("--classifier-steps", type=int, default=700, help="default: %(default)s")
    parser.add_argument(
        "--count", type=int, default=96, help="samples per row of 'evaluate' (default: 96)"
    )
    parser.add_argument("--steps", type=int, default=24, help="of sampling in 'evaluate'")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the transformer's blocks (default: yes)",
    )
    return parser


def run_stage(stage: str, arguments: argparse.Namespace, settings: Settings) -> None:
    """Run one stage."""
    if stage == "vae":
        train_vae(settings, arguments.minutes or _VAE_MINUTES)
    elif stage == "text":
        train_text(settings)
    elif stage == "transformer":
        train_transformer(settings, arguments.minutes or _TRANSFORMER_MINUTES)
    elif stage == "classifier":
        train_classifier(settings, arguments.classifier_steps)
    elif stage == "export":
        export_pipeline(settings)
    else:
        evaluate_pipeline(settings, arguments.count, arguments.steps)


def main() -> None:
    """Entry point."""
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.minutes is not None and arguments.stage not in ("vae", "transformer"):
        parser.error(f"--minutes is of the stage vae or transformer, not of {arguments.stage}")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(
        work=arguments.work,
        device=device,
        seed=arguments.seed,
        workers=arguments.workers,
        compile=arguments.compile,
    )
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        run_stage(stage, arguments, settings)


if __name__ == "__main__":
    main()
