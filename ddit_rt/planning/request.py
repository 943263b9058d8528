"""A request to an engine: what its caller asked for, checked, with the artifact's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddit_rt import checks
from ddit_rt.artifact import PRESETS, Calibration, Manifest, calibration_for
from ddit_rt.errors import ShapeError
from ddit_rt.models.arguments import call_defaults
from ddit_rt.policies import (
    POLICY_NAMES,
    DDiTPolicy,
    NoCache,
    PatchPolicy,
    StepCache,
    as_step_cache,
    parse_patch,
    parse_policy,
    patch_name,
    policy_from_dict,
    published_fast_plan,
    step_cache_from_dict,
)

PolicyChoice = PatchPolicy | str | float
"""A policy, by value or as text; the name of a calibrated preset; or a speed between 0 and 1."""

_FORMS = (
    "pass a policy such as DDiTPolicy(), as text fine, static, dynamic, spectral:0.05, mixed:0.25 "
    "or a plan such as 4p:0.2,2p:0.4,p, or of a calibration "
    f"{', '.join(PRESETS)} or a speed from 0 to 1"
)

_CONDITIONS = ("height", "width", "num_frames", "guidance_scale", "true_cfg_scale")
"""Arguments of a call that a plan's quality hangs on."""

WHOLE_RUN = (0.0, 1.0)
"""The interval of a run that is guided from its first step to its last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a run is asked to do, whatever its prompt and shape.

    Attributes:
        policy: The patch policy.
        step_cache: Which steps reuse instead of compute.
        guidance_interval: Where classifier-free guidance acts, as shares of the steps.
        batched_guidance: Whether the two passes of guidance run as one batch.
        num_inference_steps: Steps that a calibrated plan runs; None for as many as were asked for.
        sigmas: Their noise levels, as the pipeline's call takes them; None for those of the call.
        notes: What was chosen and what is left out; the trace repeats them.
        warnings: Notes that are also raised as warnings.
    """

    policy: PatchPolicy
    step_cache: StepCache = NoCache()  # noqa: RUF009 - frozen
    guidance_interval: tuple[float, float] = WHOLE_RUN
    batched_guidance: bool = True
    num_inference_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def ignoring(self, notes: tuple[str, ...]) -> Request:
        """The request with warnings about what it asks for in vain."""
        return replace(self, warnings=(*self.warnings, *notes))


def read_request(
    manifest: Manifest,
    requested: Callable[[], tuple[int, bool]],
    arguments: Mapping[str, Any],
    *,
    patch_policy: PolicyChoice | None = None,
    step_cache: StepCache | str | None = None,
    guidance_interval: tuple[float, float] = WHOLE_RUN,
    batched_guidance: bool = True,
) -> Request:
    """Reads what a call asks of an engine.

    Args:
        manifest: The artifact's, with its patch sizes, defaults and calibrations.
        requested: Returns the steps that the caller asked for, and whether noise levels of the
            caller's own fix them. A calibrated plan may run fewer.
        arguments: The arguments of the call.
        patch_policy: The policy, as `Engine.__call__` takes it.
        step_cache: The step cache, as `Engine.__call__` takes it.
        guidance_interval: Where guidance acts, as `Engine.__call__` takes it.
        batched_guidance: Whether the two passes of guidance run as one batch.

    Raises:
        TypeError, ValueError: A value that is none for its name; a preset or speed without a
            calibration for this number of steps (but `"fast"` of an artifact without any, where a
            plan is published for its family), or whose plan runs another number of steps than the
            caller's noise levels.
        ShapeError: A policy for patch sizes that the model was not compiled with.
    """
    cache, interval = as_step_cache(step_cache), check_interval(guidance_interval)
    if isinstance(patch_policy, PatchPolicy):
        choice: PolicyChoice = patch_policy
    else:
        default = default_policy(manifest)
        choice = default if patch_policy is None else parse_choice(patch_policy, default)
    if isinstance(choice, PatchPolicy):
        request = Request(policy=choice, step_cache=default_step_cache(manifest))
    elif published := _published(choice, manifest):
        request = published
    else:
        request = _calibrated(choice, manifest, requested, arguments)
    check_policy(request.policy, [parse_patch(entry.patch) for entry in manifest.buckets])
    return replace(
        request,
        step_cache=cache or request.step_cache,
        guidance_interval=interval,
        batched_guidance=batched_guidance,
    )


def _published(choice: str | float, manifest: Manifest) -> Request | None:
    """The plan that `"fast"` is before any calibration, where one is published."""
    if choice != "fast" or manifest.calibrations:
        return None
    found = published_fast_plan(manifest.family)
    if found is None:
        return None
    policy, source = found
    note = f"'fast' is a published default, not calibrated on this model: {source}"
    return Request(policy=policy, step_cache=default_step_cache(manifest), notes=(note,))


def _calibrated(
    choice: str | float,
    manifest: Manifest,
    requested: Callable[[], tuple[int, bool]],
    arguments: Mapping[str, Any],
) -> Request:
    """Looks a preset or a speed up in the artifact's calibration."""
    num_inference_steps, own_sigmas = requested()
    calibration = calibration_for(manifest.calibrations, num_inference_steps)
    plan = calibration.plan(choice)
    steps = plan.num_inference_steps
    if own_sigmas and (steps != num_inference_steps or plan.sigmas is not None):
        raise ValueError(
            f"the plan {choice!r} for {num_inference_steps} steps runs {steps} of its own"
            f"{' at its own noise levels' if plan.sigmas else ''}, and `sigmas` was given, which "
            "fixes them; leave `sigmas` out, or pass a policy"
        )
    named = repr(choice) if isinstance(choice, str) else f"{choice:g}"
    notes = [f"{named} of the calibration for {num_inference_steps} steps: {plan.label}"]
    if plan.step_cache is None and manifest.step_cache is not None:
        notes.append("the artifact's step cache is left out: that plan was measured without one")
    return Request(
        policy=policy_from_dict(plan.policy),
        step_cache=step_cache_from_dict(plan.step_cache) if plan.step_cache else NoCache(),
        num_inference_steps=steps,
        sigmas=plan.sigmas,
        notes=tuple(notes),
        warnings=_elsewhere(calibration, arguments),
    )


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
            f"got patch_policy={speed}; a speed lies between 0 (full resolution) and 1 (fastest)"
        )
    return speed


def _refusal(choice: Any, advice: str) -> str:
    came = f"got patch_policy={checks.show(choice)}" + (f" ({advice})" if advice else "")
    return f"{came}; {_FORMS}"


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


def requested_steps(pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, bool]:
    """Steps that a pipeline's call asks for, and whether by `sigmas` of its own."""
    sigmas = arguments.get("sigmas")
    if sigmas is not None:
        return len(sigmas), True
    default = call_defaults(pipeline)["num_inference_steps"]
    return int(arguments.get("num_inference_steps", default)), False


def default_policy(manifest: Manifest) -> PatchPolicy:
    """The artifact's own policy, else `DDiTPolicy()`."""
    return policy_from_dict(manifest.policy) if manifest.policy else DDiTPolicy()


def default_step_cache(manifest: Manifest) -> StepCache:
    """The artifact's own step cache, else `NoCache()`."""
    return step_cache_from_dict(manifest.step_cache) if manifest.step_cache else NoCache()


def check_interval(interval: Any) -> tuple[float, float]:
    """Start and stop of the guided steps.

    Raises:
        TypeError: No pair of numbers.
        ValueError: No interval within 0 and 1.
    """
    expected = "(start, stop), shares of the steps with 0 <= start <= stop <= 1"
    start, stop = checks.pair("guidance_interval", interval, checks.number, expected)
    if not 0 <= start <= stop <= 1:
        raise ValueError(checks.got("guidance_interval", interval, expected))
    return start, stop


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
