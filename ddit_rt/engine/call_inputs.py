"""What a user passes to an engine, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ddit_rt import checks
from ddit_rt.artifact import Artifact
from ddit_rt.errors import ArtifactMismatchError, ShapeError
from ddit_rt.models.arguments import check_arguments, check_sigmas, check_tensor
from ddit_rt.steps import StepModel

DEFAULT_STEPS = 50
"""Steps of `Engine.denoise`."""

_SCHEDULER = "a diffusers flow scheduler, such as FlowMatchEulerDiscreteScheduler()"
_SETTABLE = (
    "schema_version",
    "policy",
    "step_cache",
    "pipeline_defaults",
    "calibrations",
    "cache_fits",
)
"""Entries of a manifest that may be others than when its engine was made."""


def check_call(
    pipeline: Any,
    arguments: Mapping[str, Any],
    defaults: Mapping[str, int],
    own: Sequence[str],
) -> dict[str, Any]:
    """Arguments of an engine's call, each checked by itself.

    Args:
        pipeline: The diffusers pipeline.
        arguments: Those of the pipeline's call that came.
        defaults: Sizes that were passed to `compile`.
        own: Names of the arguments that are the engine's own.

    Returns:
        What came, as plain values, and the defaults where nothing did.

    Raises:
        TypeError, ValueError: An unknown argument, or a value that is none for its name.
    """
    given = {name: value for name, value in arguments.items() if _says_more(name, value, defaults)}
    checked = {**defaults, **check_arguments(pipeline, given, own)}
    _check_step_counts(checked.get("num_inference_steps"), checked.get("sigmas"))
    return checked


def check_schedule(
    num_inference_steps: int | None, sigmas: Sequence[float] | None
) -> tuple[int, list[float] | None]:
    """Steps and noise levels of `Engine.denoise`.

    Raises:
        TypeError, ValueError: Values that are none, or a number of steps beside noise levels of
            another number.
    """
    steps = checks.optional(checks.whole, "num_inference_steps", num_inference_steps, 1)
    levels = checks.optional(check_sigmas, "sigmas", sigmas)
    _check_step_counts(steps, levels)
    return len(levels) if levels is not None else steps or DEFAULT_STEPS, levels


def check_scheduler(scheduler: Any) -> Any:
    """The scheduler of `Engine.denoise`.

    Raises:
        TypeError: No scheduler, or the class of one.
    """
    parts = ("set_timesteps", "step", "config")
    if isinstance(scheduler, type) or not all(hasattr(scheduler, part) for part in parts):
        advice = "call the class" if isinstance(scheduler, type) else ""
        raise TypeError(checks.got("scheduler", scheduler, _SCHEDULER, advice))
    return scheduler


def check_latents(latents: Tensor, model: StepModel) -> None:
    """Refuses initial latents of a shape that the model does not take.

    Raises:
        TypeError: No tensor of floating-point numbers.
        ShapeError: Not `[B, C, H, W]`, for videos `[B, C, F, H, W]`.
    """
    channels = model.family.latent_channels(model.transformer)
    axes = "F, H, W" if model.family.video else "H, W"
    check_tensor("latents", latents, f"[B, {channels}, {axes}]")
    if latents.ndim != 2 + axes.count(",") + 1 or latents.shape[1] != channels:
        raise ShapeError(
            f"latents have shape {list(latents.shape)}; expected [B, {channels}, {axes}]"
        )


def check_artifact(artifact: Artifact, current: Artifact) -> Artifact:
    """An artifact that takes the place of an engine's, with other calibrations or fits.

    Raises:
        TypeError: No artifact.
        ArtifactMismatchError: One of another model, or of other packages.
    """
    checks.instance("artifact", artifact, Artifact, "an artifact, such as engine.artifact")
    mine = current.manifest
    theirs = replace(artifact.manifest, **{name: getattr(mine, name) for name in _SETTABLE})
    if theirs != mine:
        raise ArtifactMismatchError(
            "got an artifact of another model or of other packages than this engine runs; set one "
            "that was made from engine.artifact, or load it with ddit_rt.load"
        )
    return artifact


def _check_step_counts(steps: int | None, sigmas: Sequence[float] | None) -> None:
    if steps is not None and sigmas is not None and steps != len(sigmas):
        raise ValueError(
            f"got num_inference_steps={steps} and {len(sigmas)} sigmas, which say the steps; leave "
            "one of them out"
        )


def _says_more(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether an argument is not just None for the default."""
    return value is not None or name not in defaults
