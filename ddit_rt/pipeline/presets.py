"""Calibrated plans by name or speed: `patch_policy="balanced"`, `patch_policy=0.5`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ddit_rt.artifact import Calibration, Manifest, calibration_for
from ddit_rt.patch_scheduler import PatchPolicy, policy_from_dict
from ddit_rt.step_cache import NoCache, StepCache, step_cache_from_dict

PolicyChoice = PatchPolicy | str | float
"""A policy; the name of a calibrated preset; or a speed between 0 and 1."""

_CONDITIONS = ("height", "width", "num_frames", "guidance_scale", "true_cfg_scale")
"""Arguments of a call that a plan's quality hangs on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedPolicy:
    """What a `PolicyChoice` means for one run.

    Attributes:
        policy: The policy.
        num_inference_steps: Steps to run; None for as many as the caller asked for.
        step_cache: The calibrated plan's step cache, `NoCache()` where it has none; None for a
            policy, which says nothing of it.
        notes: For the trace: what was chosen.
        warnings: What should be said aloud too.
    """

    policy: PatchPolicy
    num_inference_steps: int | None = None
    step_cache: StepCache | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def resolve_choice(
    choice: PolicyChoice,
    manifest: Manifest,
    requested: Callable[[], tuple[int, bool]],
    arguments: Mapping[str, Any],
) -> ResolvedPolicy:
    """Looks a preset or a speed up in the artifact's calibration.

    Args:
        choice: What the caller passed.
        manifest: The artifact's.
        requested: Gives the steps that the caller asked for, and whether noise levels of the
            caller's own fix them. They are those of the all-fine picture whose quality is the
            measure; the plan may run fewer.
        arguments: Those of the call.

    Raises:
        ValueError: No calibration for this number of steps, an unknown preset, a speed outside
            [0, 1], or a plan of fewer steps for noise levels that the caller fixed.
        TypeError: None of the three.
    """
    if isinstance(choice, PatchPolicy):
        return ResolvedPolicy(policy=choice)
    if isinstance(choice, bool) or not isinstance(choice, (str, int, float)):
        raise TypeError(
            f"got patch_policy={choice!r}; pass a policy such as DDiTPolicy(), the name of a "
            "calibrated preset, or a speed between 0 and 1"
        )
    num_inference_steps, own_sigmas = requested()
    calibration = calibration_for(manifest.calibrations, num_inference_steps)
    plan = calibration.plan(choice)
    steps = plan.num_inference_steps
    if own_sigmas and steps != num_inference_steps:
        raise ValueError(
            f"the plan {choice!r} for {num_inference_steps} steps runs {steps} of its own, and "
            "`sigmas` was given, which fixes them; leave `sigmas` out, or pass a policy"
        )
    notes = [f"{choice!r} of the calibration for {num_inference_steps} steps: {plan.label}"]
    if plan.step_cache is None and manifest.step_cache is not None:
        notes.append("the artifact's step cache is left out: that plan was measured without one")
    return ResolvedPolicy(
        policy=policy_from_dict(plan.policy),
        num_inference_steps=steps,
        step_cache=step_cache_from_dict(plan.step_cache) if plan.step_cache else NoCache(),
        notes=tuple(notes),
        warnings=_elsewhere(calibration, arguments),
    )


def _elsewhere(calibration: Calibration, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Says so where a call differs from what was calibrated."""
    known = calibration.evidence.get("arguments", {})
    differing = [
        f"{name}={known[name]}, not {arguments[name]}"
        for name in _CONDITIONS
        if name in known and name in arguments and known[name] != arguments[name]
    ]
    if not differing:
        return ()
    how = "; ".join(differing)
    return (f"the plan was calibrated with {how}: how close it comes is not known; calibrate anew",)


def requested_steps(pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, bool]:
    """Steps that a pipeline's call asks for, and whether by `sigmas` of its own."""
    sigmas = arguments.get("sigmas")
    if sigmas is not None:
        return len(sigmas), True
    default = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    return int(arguments.get("num_inference_steps", default)), False
