"""What commands say of the model that they are given, and ask of its pipeline's call."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.options import number, whole
from ddit_rt.sources import DTYPES, MODEL_HELP, embedded_defaults, load_pipeline

if TYPE_CHECKING:
    from ddit_rt.artifact import Manifest
    from ddit_rt.engine import Engine

DEVICES = ("cpu", "cuda")

_CALL = (
    *("height", "width", "guidance_scale", "max_sequence_length", "negative_prompt", "num_frames"),
    *("true_cfg_scale", "guidance_interval", "audio_duration_s"),
)


def add_call_arguments(parser: argparse.ArgumentParser, *, guidance: bool = True) -> None:
    """Declares what every command that runs an artifact asks of the pipeline's call."""
    parser.add_argument("--height", type=whole(1), help="default: as compiled")
    parser.add_argument("--width", type=whole(1), help="default: as compiled")
    parser.add_argument(
        "--audio-duration-s", type=number(0), help="of a recording; default: the pipeline's"
    )
    if guidance:
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


def pipeline_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call that were given; the others keep its defaults."""
    given = {"num_inference_steps": args.steps}
    given |= {name: getattr(args, name, None) for name in _CALL}  # no command has them all
    given = {name: value for name, value in given.items() if value is not None}
    return {**embedded_text(args.model or args.artifact), **given}


def embedded_text(model: str) -> dict[str, int]:
    """How long a text an embedded model was trained with, as an argument of its call."""
    name = "max_sequence_length"
    return {key: n for key, n in embedded_defaults(model).items() if key == name}


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which weights an artifact runs on, where a demo needs no name for them."""
    parser.add_argument("--model", help=f"the weights: {MODEL_HELP}; default: those of a demo")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as compiled")
    add_trust_argument(parser)


def add_trust_argument(parser: argparse.ArgumentParser, then: str = "") -> None:
    """Declares `--trust-code`, with what else comes of it."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help=f"run the compiled code of an artifact that was not built on this machine{then}",
    )


def load_artifact(args: argparse.Namespace, manifest: Manifest, executor: str = "auto") -> Engine:
    """The artifact of a command on its model.

    Raises:
        ValueError, OSError: See `load_pipeline`.
        ArtifactError: See `ddit_rt.load`.
    """
    pipeline = load_pipeline(args.model, args.dtype or manifest.dtype, manifest.environment.device)
    import ddit_rt

    return ddit_rt.load(args.artifact, pipeline, trust_code=args.trust_code, executor=executor)


def require_eval(command: str, *modules: str) -> None:
    """Refuses, before minutes of work, to start without what scores and draws.

    Raises:
        ModuleNotFoundError: One of these modules of the extra `eval` is not there.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{command} needs {' and '.join(missing)}; pip install 'ddit_rt[eval]'"
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
