"""What commands say of the model that they are given, and ask of its pipeline's call."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ddit_rt.cli.options import number, whole
from ddit_rt.sources import (
    DTYPES,
    EMBEDDED,
    EMBEDDED_VIDEO,
    MODEL_HELP,
    choose_device,
    embedded_defaults,
    embedded_path,
    embedded_policy,
    load_pipeline,
    refuse_sound,
)

if TYPE_CHECKING:
    from ddit_rt.artifact import Manifest

__all__ = [
    "DEVICES",
    "DTYPES",
    "EMBEDDED",
    "EMBEDDED_VIDEO",
    "MODEL_HELP",
    "add_call_arguments",
    "add_further_arguments",
    "choose_device",
    "embedded_defaults",
    "embedded_path",
    "embedded_policy",
    "load_pipeline",
    "refuse_sound",
    "refuse_video",
]

DEVICES = ("cpu", "cuda")


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what every command that runs an artifact asks of the pipeline's call."""
    parser.add_argument("--height", type=whole(1), help="default: as compiled")
    parser.add_argument("--width", type=whole(1), help="default: as compiled")
    parser.add_argument(
        "--audio-duration-s", type=number(0), help="of a recording; default: the pipeline's"
    )
    parser.add_argument("--guidance-scale", type=number(), help="default: the pipeline's")
    parser.add_argument(
        "--max-sequence-length", type=whole(1), help="text tokens; default: the pipeline's"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as compiled")


def add_further_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what commands that make videos too ask of it besides."""
    parser.add_argument("--num-frames", type=whole(1), help="of a video; default: as compiled")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="one for all prompts")
    parser.add_argument(
        "--true-cfg-scale",
        type=number(),
        help="FLUX's guidance by --negative-prompt; default: 1, off",
    )


def refuse_video(manifest: Manifest, command: str) -> None:
    """Refuses an artifact of a video model where images are compared.

    Raises:
        UnsupportedModelError: It is one.
    """
    from ddit_rt.errors import UnsupportedModelError
    from ddit_rt.models import family_named

    if family_named(manifest.family).video:
        raise UnsupportedModelError(
            f"ddit-rt {command} compares images, and this artifact makes videos "
            f"({manifest.transformer_class}); compare its plans with ddit-rt calibrate, which goes "
            "by SSIM, or by eye with ddit-rt generate --policy"
        )
