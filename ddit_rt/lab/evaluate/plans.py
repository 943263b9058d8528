"""Which plans stand side by side: full resolution, the chosen ones, and baselines of equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ddit_rt.artifact import PRESETS, Calibration, Manifest
from ddit_rt.lab.plans.candidates import (
    CACHED,
    FINE,
    Candidate,
    cache_text,
    full_resolution,
    kind_of,
)
from ddit_rt.lab.plans.genome import LEAST_STEPS, Genome, Static, within
from ddit_rt.planning.request import PolicyChoice, read_request
from ddit_rt.policies import (
    DDiTPolicy,
    FinePolicy,
    NoCache,
    PatchPolicy,
    StaticPolicy,
    StepCache,
    TeaCache,
)

REFERENCE, CHOSEN, BASELINE = "reference", "chosen", "rival"
"""Roles, by the names that they have in records."""

EQUAL_STEPS, EQUAL_STATIC, TEACACHE = "equal-steps", "equal-static", "teacache"
_NAMES = {
    FINE: "full resolution",
    EQUAL_STEPS: "fewer steps, equal cost",
    EQUAL_STATIC: "static, equal cost",
    TEACACHE: "TeaCache, equal cost",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedPlan:
    """A plan of an evaluation.

    Attributes:
        name: Identifier in reports and file names.
        role: `"reference"` (full resolution), `"chosen"`, or `"rival"`: a baseline at about the
            main plan's cost.
        candidate: The plan.
    """

    name: str
    role: str
    candidate: Candidate

    @property
    def title(self) -> str:
        """Name for people."""
        if self.name in _NAMES:
            return _NAMES[self.name]
        kind = self.candidate.kind
        return kind if self.name == kind else f"{self.name} ({kind})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "name": self.name,
            "title": self.title,
            "role": self.role,
            "kind": self.candidate.kind,
            "label": self.candidate.label,
            **self.candidate.does(),
            "step_cache": self.candidate.step_cache.to_dict(),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> NamedPlan:
        """What `to_dict` gave."""
        candidate = Candidate.doing(data["kind"], data["label"], data)
        return NamedPlan(name=data["name"], role=data["role"], candidate=candidate)


def reference_plan(steps: int) -> NamedPlan:
    """Full resolution at the full number of steps."""
    return NamedPlan(name=FINE, role=REFERENCE, candidate=full_resolution(steps))


def chosen_plans(
    choices: Sequence[tuple[str, PolicyChoice]],
    manifest: Manifest,
    default: PatchPolicy,
    steps: int,
    default_cache: StepCache = NoCache(),  # noqa: B008 - frozen
) -> list[NamedPlan]:
    """The plans that a caller named, each with the step cache that a call of it would have.

    Args:
        choices: Name and policy, preset or speed of each; none for what the artifact holds: the
            presets of its calibration for `steps`, with a dynamic plan among them, else its
            default policy.
        manifest: The artifact's.
        default: The engine's default policy.
        steps: Steps of the reference.
        default_cache: The artifact's step cache, which a calibrated plan does not take.

    Raises:
        ValueError: A preset without calibration, or nothing that differs from full resolution.
    """
    if choices:
        named = [
            _resolved(name, choice, manifest, steps, default_cache) for name, choice in choices
        ]
    else:
        named = _of_artifact(manifest, default, steps, default_cache)
    seen, found = {full_resolution(steps).key}, []
    for name, candidate in named:
        if candidate.key not in seen:
            seen.add(candidate.key)
            found.append(NamedPlan(name=name, role=CHOSEN, candidate=candidate))
    if not found:
        raise ValueError(
            f"got only plans that run all {steps} steps at p, as the reference does; choose "
            "another one with --policy"
        )
    return found


def main_plan(plans: Sequence[NamedPlan]) -> NamedPlan:
    """The plan that gets baselines of its cost: the first dynamic one chosen, else the first.

    Args:
        plans: Plans of any roles, one chosen among them.
    """
    chosen = [plan for plan in plans if plan.role == CHOSEN]
    return next((plan for plan in chosen if _is_dynamic(plan.candidate)), chosen[0])


def baselines(
    main: NamedPlan, cost: float, costs: Mapping[str, float], steps: int
) -> tuple[list[NamedPlan], list[str]]:
    """Fewer steps and a static plan of about a cost, to half a step at p.

    Args:
        main: The plan that they are compared with.
        cost: Mean cost of an image.
        costs: Cost of one step at each patch size that the engine offers.
        steps: Steps of the reference.

    Returns:
        The baselines, and a note for each that cannot be.
    """
    limit = cost + costs["p"] / 2
    coarse = tuple(size for size in costs if size != "p")[-1:]
    # The best shape on the demo model comes first; later ones can be cheaper.
    shapes = [
        Static(count=1, sizes=coarse),
        Static(count=1, sizes=coarse, refresh=None),
        Static(count=1, sizes=coarse, refresh=None, head=0),
    ]
    fewer = min(int(limit / costs["p"]), steps)
    found, notes = [], []
    for name, what, genome in (
        (EQUAL_STEPS, "run of fewer steps", Genome(steps=fewer) if fewer else None),
        (
            EQUAL_STATIC,
            "static plan",
            within(shapes, steps, limit, costs) if coarse and steps >= LEAST_STEPS else None,
        ),
    ):
        plan = genome.candidate() if genome else None
        if plan is None:
            notes.append(f"no {what} of {steps} steps is as cheap as {main.name}")
        elif plan.key == main.candidate.key:
            notes.append(f"{main.name} is itself the {what} of its cost")
        else:
            found.append(NamedPlan(name=name, role=BASELINE, candidate=plan))
    return found, notes


def cached_plan(threshold: float, steps: int) -> NamedPlan:
    """All steps at p, with TeaCache."""
    cache = TeaCache(threshold)
    label = f"{steps} steps at p, {cache_text(cache)}"
    candidate = replace(full_resolution(steps), kind=CACHED, label=label, step_cache=cache)
    return NamedPlan(name=TEACACHE, role=BASELINE, candidate=candidate)


def _resolved(
    name: str, choice: PolicyChoice, manifest: Manifest, steps: int, default_cache: StepCache
) -> tuple[str, Candidate]:
    resolved = read_request(manifest, lambda: (steps, False), {}, patch_policy=choice)
    runs = resolved.num_inference_steps or steps
    label = resolved.notes[0] if resolved.notes else _describe(resolved.policy, runs)
    cache = resolved.step_cache if resolved.num_inference_steps else default_cache
    candidate = _candidate(resolved.policy, runs, label, cache)
    return name, replace(candidate, sigmas=resolved.sigmas)


def _candidate(policy: PatchPolicy, steps: int, label: str, cache: StepCache) -> Candidate:
    return Candidate(
        kind=kind_of(policy, cache),
        label=label,
        policy=policy,
        num_inference_steps=steps,
        step_cache=cache,
    )


def _describe(policy: PatchPolicy, steps: int) -> str:
    mixed = f", {policy.fine_share:.0%} at p" if policy.fine_share else ""
    if isinstance(policy, FinePolicy):
        return f"{steps} steps at p"
    if isinstance(policy, StaticPolicy):
        plan = policy.plan if isinstance(policy.plan, str) else "a plan of its own"
        return f"static, {steps} steps, {plan}{mixed}"
    if isinstance(policy, DDiTPolicy):
        tau = policy.tau
        sizes = ", ".join(f"{s} {v:g}" for s, v in tau.items()) if isinstance(tau, Mapping) else tau
        return f"dynamic, {steps} steps, tau {sizes}{mixed}"
    return f"{type(policy).__name__}, {steps} steps"


def _of_artifact(
    manifest: Manifest, default: PatchPolicy, steps: int, default_cache: StepCache
) -> list[tuple[str, Candidate]]:
    calibration = next((c for c in manifest.calibrations if c.num_inference_steps == steps), None)
    named = [("default", _candidate(default, steps, _describe(default, steps), default_cache))]
    if calibration is None:
        return named
    presets = [
        _resolved(name, name, manifest, steps, default_cache) for name in ("balanced", *PRESETS)
    ]
    if not any(_is_dynamic(candidate) for _, candidate in presets):
        presets += _dynamic_of(calibration) or named
    return presets


def _is_dynamic(candidate: Candidate) -> bool:
    return isinstance(candidate.policy, DDiTPolicy)


def _dynamic_of(calibration: Calibration) -> list[tuple[str, Candidate]]:
    """The dynamic plan of the front that costs most nearly what `balanced` does."""
    plans = [plan for plan in calibration.front if plan.policy["policy"] == DDiTPolicy.__name__]
    balanced = calibration.presets["balanced"].cost
    nearest = min(plans, key=lambda plan: abs(plan.cost - balanced), default=None)
    if nearest is None:
        return []
    return [("dynamic", Candidate.doing(nearest.kind, nearest.label, asdict(nearest)))]
