"""Calibrated plans by name or speed: `patch_policy="balanced"`, `patch_policy=0.5`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddit_rt import checks
from ddit_rt.artifact import PRESETS, Calibration, Manifest, calibration_for
from ddit_rt.errors import ShapeError
from ddit_rt.models.arguments import call_defaults
from ddit_rt.policies import (
    POLICY_NAMES,
    NoCache,
    PatchPolicy,
    StepCache,
    parse_policy,
    patch_name,
    policy_from_dict,
    step_cache_from_dict,
)

PolicyChoice = PatchPolicy | str | float
"""A policy, by value or as text; the name of a calibrated preset; or a speed between 0 and 1."""

_FORMS = (
    "pass a policy such as DDiTPolicy(), as text fine, static, dynamic or a plan such as "
    f"4p:0.2,2p:0.4,p, or of a calibration {', '.join(PRESETS)} or a speed from 0 to 1"
)

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


def parse_choice(choice: Any, default: PatchPolicy) -> PolicyChoice:
    """The policy that a caller passed; a preset stays its name, and a speed a number.

    Args:
        choice: What came.
        default: The policy of calls that name none; `"dynamic"` starts from it.

    Raises:
        TypeError: Another type, or the class of a policy.
        ValueError: A text that stands for none, or a speed outside [0, 1].
    """
    if isinstance(choice, PatchPolicy):
        return choice
    if isinstance(choice, str):
        policy = parse_policy(choice, default)
        if policy is not None:
            return policy
        if choice.strip() in PRESETS:
            return choice.strip()
        try:
            choice = float(choice)
        except ValueError:
            advice = checks.did_you_mean(choice, (*POLICY_NAMES, *PRESETS))
            raise ValueError(_refusal(choice, advice)) from None
    try:
        speed = checks.number("patch_policy", choice)
    except TypeError:
        is_class = isinstance(choice, type) and issubclass(choice, PatchPolicy)
        advice = "call the class" if is_class else ""
        raise TypeError(_refusal(choice, advice)) from None
    if not 0 <= speed <= 1:
        raise ValueError(
            f"got patch_policy={speed}; a speed lies between 0 (all fine) and 1 (fastest)"
        )
    return speed


def _refusal(choice: Any, advice: str) -> str:
    came = f"got patch_policy={checks.show(choice)}" + (f" ({advice})" if advice else "")
    return f"{came}; {_FORMS}"


def resolve_choice(
    choice: PolicyChoice,
    manifest: Manifest,
    requested: Callable[[], tuple[int, bool]],
    arguments: Mapping[str, Any],
) -> ResolvedPolicy:
    """Looks a preset or a speed up in the artifact's calibration.

    Args:
        choice: What `parse_choice` gave.
        manifest: The artifact's.
        requested: Gives the steps that the caller asked for, and whether noise levels of the
            caller's own fix them. They are those of the all-fine picture whose quality is the
            measure; the plan may run fewer.
        arguments: Those of the call.

    Raises:
        ValueError: No calibration for this number of steps, or a plan of fewer steps for noise
            levels that the caller fixed.
    """
    if isinstance(choice, PatchPolicy):
        return ResolvedPolicy(policy=choice)
    num_inference_steps, own_sigmas = requested()
    calibration = calibration_for(manifest.calibrations, num_inference_steps)
    plan = calibration.plan(choice)
    steps = plan.num_inference_steps
    if own_sigmas and steps != num_inference_steps:
        raise ValueError(
            f"the plan {choice!r} for {num_inference_steps} steps runs {steps} of its own, and "
            "`sigmas` was given, which fixes them; leave `sigmas` out, or pass a policy"
        )
    named = repr(choice) if isinstance(choice, str) else f"{choice:g}"
    notes = [f"{named} of the calibration for {num_inference_steps} steps: {plan.label}"]
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
    differing = ["the pipeline's own noise levels, not `sigmas`"] * _other_levels(arguments)
    differing += [
        f"{name}={known[name]}, not {arguments[name]}"
        for name in _CONDITIONS
        if name in known and name in arguments and known[name] != arguments[name]
    ]
    if not differing:
        return ()
    how = "; ".join(differing)
    return (f"the plan was calibrated with {how}: how close it comes is not known; calibrate anew",)


def _other_levels(arguments: Mapping[str, Any]) -> bool:
    """Whether noise levels were given, and are not those that the pipeline would take."""
    sigmas = arguments.get("sigmas")
    if sigmas is None:
        return False
    steps = len(sigmas)
    return any(abs(sigma - (1 - step / steps)) > 1e-6 for step, sigma in enumerate(sigmas))


def requested_steps(pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, bool]:
    """Steps that a pipeline's call asks for, and whether by `sigmas` of its own."""
    sigmas = arguments.get("sigmas")
    if sigmas is not None:
        return len(sigmas), True
    default = call_defaults(pipeline)["num_inference_steps"]
    return int(arguments.get("num_inference_steps", default)), False


def check_policy(policy: PatchPolicy, multiples: Sequence[int]) -> None:
    """Refuses a policy for patch sizes that the model was not compiled with.

    Raises:
        ShapeError: See above.
    """
    missing = sorted(policy.sizes - set(multiples))
    if missing:
        raise ShapeError(
            f"the policy asks for {', '.join(map(patch_name, missing))}, but the compiled sizes "
            f"offer only {[patch_name(multiple) for multiple in multiples]}; choose another "
            "policy, or compile with that size among patch_sizes"
        )
