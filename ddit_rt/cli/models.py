"""Loading the diffusers pipeline that a command names."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.options import number, whole

if TYPE_CHECKING:
    from ddit_rt.artifact import Manifest
    from ddit_rt.policies import PatchPolicy

EMBEDDED = "demo"
"""The model name that stands for the pipeline inside the package."""

EMBEDDED_VIDEO = "demo-video"
"""The same for the video pipeline inside the package."""

DTYPES = ("float32", "bfloat16", "float16")

MODEL_HELP = (
    "a diffusers folder, a Hub name, or 'demo' or 'demo-video' for the models inside the package"
)


DEVICES = ("cpu", "cuda")

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what every command that runs an artifact asks of the pipeline's call."""
    parser.add_argument("--height", type=whole(1), help="default: as compiled")
    parser.add_argument("--width", type=whole(1), help="default: as compiled")
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


def choose_device(device: str) -> str:
    """`"cuda"` or `"cpu"`; `"auto"` is CUDA where torch can use it.

    Raises:
        ValueError: CUDA was asked for and cannot be used.
    """
    import torch

    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device == "cuda" and not available:
        from ddit_rt import _runtime

        reason = _runtime.cuda_status()["reason"] or f"torch {torch.__version__} has no CUDA"
        raise ValueError(f"this needs a CUDA device, and torch can use none here: {reason}")
    return device


def load_pipeline(model: str, dtype: str | None = None, device: str = "cpu") -> Any:
    """A diffusers pipeline, of the class that its own index names.

    Args:
        model: A folder written by `save_pretrained`, a Hub name, `"demo"` or `"demo-video"`.
        dtype: One of `DTYPES`; by default float32.
        device: One of `DEVICES`, or `"auto"`.

    Raises:
        ValueError: No such folder, one that holds no pipeline, a package without the demo model,
            or no CUDA device.
        OSError: Neither a folder nor a name that the Hub knows.
    """
    import torch
    from diffusers import DiffusionPipeline

    device = choose_device(device)
    source = embedded_path(model) if model in (EMBEDDED, EMBEDDED_VIDEO) else model
    if not Path(source).exists() and _HUB_NAME.fullmatch(source) is None:
        raise ValueError(f"no such folder: {source}; expected {MODEL_HELP}")
    if Path(source).is_file():
        raise ValueError(f"{source} is a file; expected {MODEL_HELP}")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise ValueError(
            f"{source} is a folder without model_index.json; give the folder of a whole pipeline, "
            "as pipeline.save_pretrained writes it"
        )
    wanted = torch.float32 if dtype is None else getattr(torch, dtype)
    pipeline = DiffusionPipeline.from_pretrained(source, dtype=wanted)
    if pipeline.dtype is not wanted:  # a release that knows the argument by its older name
        pipeline.to(wanted)
    return pipeline if device == "cpu" else pipeline.to(device)


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


def refuse_sound(manifest: Manifest, command: str, *, audio: bool = True) -> None:
    """Refuses an artifact of a model that makes sound, which would be left out.

    Args:
        manifest: The artifact's.
        command: Who asks.
        audio: Whether sound without a video is refused too.

    Raises:
        UnsupportedModelError: It is one.
    """
    from ddit_rt.errors import UnsupportedModelError
    from ddit_rt.models import family_named

    family = family_named(manifest.family)
    if family.soundtrack or (audio and family.audio):
        raise UnsupportedModelError(
            f"ddit-rt {command} leaves sound beside a video out, and plans of sound are not "
            f"compared; this artifact makes sound ({manifest.transformer_class}): call its engine "
            "in Python, as docs/models says"
        )


def embedded_defaults(model: str) -> dict[str, int]:
    """Call arguments that an embedded model was trained with; empty for any other model."""
    if model not in (EMBEDDED, EMBEDDED_VIDEO):
        return {}
    from ddit_rt.lab.demo.prompts import IMAGE_CALL, VIDEO_CALL

    return VIDEO_CALL if model == EMBEDDED_VIDEO else IMAGE_CALL


def embedded_policy(model: str) -> PatchPolicy | None:
    """The policy that was tuned on an embedded model; None, the library's, for any other."""
    if model not in (EMBEDDED, EMBEDDED_VIDEO):
        return None
    from ddit_rt.lab.demo.plans import DEMO_POLICY, VIDEO_POLICY

    return VIDEO_POLICY if model == EMBEDDED_VIDEO else DEMO_POLICY


def embedded_path(model: str) -> str:
    """Folder of an embedded model.

    Raises:
        ValueError: This installation has none.
    """
    from ddit_rt.lab.demo import model_path, video_model_path

    path = model_path() if model == EMBEDDED else video_model_path()
    if not path.is_dir():
        raise ValueError(
            f"this installation lacks the model {model} ({path}); install ddit_rt from a complete "
            "source tree or wheel, or name another model"
        )
    return str(path)
