"""The pipeline and the engine that names stand for: folders, Hub names, the embedded models."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddit_rt.artifact import Manifest
    from ddit_rt.engine import Engine
    from ddit_rt.policies import PatchPolicy

EMBEDDED = "demo"
"""The model name that stands for the pipeline inside the package."""

EMBEDDED_VIDEO = "demo-video"
"""The same for the video pipeline inside the package."""

DTYPES = ("float32", "bfloat16", "float16")

MODEL_HELP = (
    "a diffusers folder, a Hub name, or 'demo' or 'demo-video' for the models inside the package"
)


_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
    # A pickle may run code, so that none is read where there are no safetensors.
    pipeline = DiffusionPipeline.from_pretrained(source, dtype=wanted, use_safetensors=True)
    if pipeline.dtype is not wanted:  # a release that knows the argument by its older name
        pipeline.to(wanted)
    return pipeline if device == "cpu" else pipeline.to(device)


def refuse_sound(manifest: Manifest, command: str, *, audio: bool = False) -> None:
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
            f"ddit-rt {command} leaves sound out, and this artifact makes it "
            f"({manifest.transformer_class}): call its engine in Python, as docs/models says"
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


def load_engine(
    artifact: str,
    model: str | None = None,
    *,
    command: str,
    dtype: str | None = None,
    trust_code: bool = False,
) -> Engine:
    """An artifact on the weights of its model.

    Args:
        artifact: A folder that `compile` wrote, `"demo"` or `"demo-video"`.
        model: The weights, as for `load_pipeline`; of a demo none are named.
        command: Who asks, for messages.
        dtype: Of the weights; by default as compiled.
        trust_code: Runs the compiled code of an artifact that was not built on this machine.

    Raises:
        ValueError: A model that does not go with the artifact, or none.
        ArtifactError: No artifact that can be loaded on that model here.
        UnsupportedModelError: The model makes sound.
    """
    import ddit_rt
    from ddit_rt.artifact import read_manifest

    check_names(artifact, model)
    if model is None or is_embedded(artifact):
        return kept_demo(artifact, dtype)
    path = Path(artifact)
    manifest = read_manifest(path)
    refuse_sound(manifest, command, audio=True)
    device = manifest.environment.device
    pipeline = _quiet(load_pipeline(model, dtype or manifest.dtype, device))
    return ddit_rt.load(path, pipeline, trust_code=trust_code)


def check_names(artifact: str, model: str | None) -> None:
    """Checks that an artifact and a model go together, as far as their names tell.

    Raises:
        ValueError: They do not.
    """
    if is_embedded(artifact):
        if model not in (None, artifact):
            raise ValueError(
                f"got {artifact} and --model {model}; {artifact} is the model inside the package: "
                "leave --model out, or name an artifact of your model"
            )
    elif model is None:
        raise ValueError(
            f"got the artifact {artifact} without --model; an artifact holds no weights: name "
            "the model that it was compiled from"
        )


def engine_loader(
    artifact: str,
    model: str | None,
    *,
    command: str,
    dtype: str | None = None,
    trust_code: bool = False,
) -> Callable[[], Engine]:
    """`load_engine` of these arguments, for a process that has another working directory."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).exists() else name

    return partial(
        load_engine,
        absolute(artifact),
        None if model is None else absolute(model),
        command=command,
        dtype=dtype,
        trust_code=trust_code,
    )


def is_embedded(artifact: str) -> bool:
    """Whether an artifact's name stands for an embedded model, and for no folder."""
    return artifact in (EMBEDDED, EMBEDDED_VIDEO) and not Path(artifact).exists()


def kept_demo(name: str, dtype: str | None = None) -> Engine:
    """An engine of an embedded model: compiled once for this user, and loaded from then on.

    Args:
        name: `"demo"` or `"demo-video"`.
        dtype: Of its weights; by default float32.
    """
    import ddit_rt
    from ddit_rt.artifact.trust import require_trust_list
    from ddit_rt.errors import ArtifactError

    pipeline = _quiet(load_pipeline(name, dtype, "auto"))
    device = next(pipeline.transformer.parameters()).device.type
    path = require_trust_list().parent / f"{name}-{dtype or 'float32'}-{device}.ddit"
    try:
        return _with_speeds(ddit_rt.load(path, pipeline, progress=False), name)
    except ArtifactError:
        pass  # none yet, or one of another version, which makes room
    size: dict[str, Any] = {
        key: n for key, n in embedded_defaults(name).items() if key != "max_sequence_length"
    }
    engine = ddit_rt.compile(pipeline, patch_policy=embedded_policy(name), **size)
    engine.save(path)
    return _with_speeds(engine, name)


def _with_speeds(engine: Engine, name: str) -> Engine:
    """The same with the calibration that the package has of its model."""
    from ddit_rt.lab.demo.plans import demo_calibration

    if name == EMBEDDED:
        engine.artifact = engine.artifact.with_calibration(demo_calibration())
    return engine


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
