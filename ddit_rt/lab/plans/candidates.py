"""A plan as a run takes it: steps, their noise levels, patch sizes, and which of them reuse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ddit_rt.lab.measure.timing import Method, engine_method
from ddit_rt.policies import (
    FinePolicy,
    NoCache,
    PatchPolicy,
    StaticPolicy,
    StepCache,
    policy_from_dict,
    step_cache_from_dict,
)

FINE, STEPS, STATIC = "fine", "steps", "static"
CACHED, DYNAMIC, COMBINED = "cached", "dynamic", "combined"
KINDS = (STEPS, STATIC, CACHED, DYNAMIC, COMBINED)
"""Kinds of plans that are faster than full resolution, the simplest first."""


def kind_of(policy: PatchPolicy, step_cache: StepCache) -> str:
    """Which kind of plan a policy and a step cache make."""
    cached = not isinstance(step_cache, NoCache)
    if isinstance(policy, FinePolicy):
        return CACHED if cached else STEPS
    if cached:
        return COMBINED
    return STATIC if isinstance(policy, StaticPolicy) else DYNAMIC


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One plan to measure.

    Attributes:
        kind: `"fine"` (the reference), `"steps"` (steps at p), `"static"`, `"dynamic"`, `"cached"`
            (steps at p, with a step cache), or `"combined"` (coarse steps and a step cache).
        label: The plan in a few words.
        policy: Which patch size each step takes.
        num_inference_steps: How many steps.
        step_cache: Which of them reuse.
        sigmas: Their noise levels, as the pipeline's call takes them; None for its own.
    """

    kind: str
    label: str
    policy: PatchPolicy
    num_inference_steps: int
    step_cache: StepCache = NoCache()  # noqa: RUF009 - frozen
    sigmas: tuple[float, ...] | None = None

    @property
    def key(self) -> str:
        """Equal for plans that do the same."""
        return json.dumps(self.does(), sort_keys=True)

    def does(self) -> dict[str, Any]:
        """What it does, as JSON gives it back; what it does not do, it does not name."""
        found = {
            "policy": self.policy.to_dict(),
            "num_inference_steps": self.num_inference_steps,
            "step_cache": self.step_cache.to_dict(),
            "sigmas": self.sigmas,
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))
        if isinstance(self.step_cache, NoCache):
            del plain["step_cache"]
        if self.sigmas is None:
            del plain["sigmas"]
        return plain

    @staticmethod
    def doing(kind: str, label: str, does: Mapping[str, Any]) -> Candidate:
        """The candidate of which `does` came."""
        cache, sigmas = does.get("step_cache"), does.get("sigmas")
        return Candidate(
            kind=kind,
            label=label,
            policy=policy_from_dict(does["policy"]),
            num_inference_steps=does["num_inference_steps"],
            step_cache=step_cache_from_dict(cache) if cache else NoCache(),
            sigmas=tuple(sigmas) if sigmas else None,
        )

    def on(self, engine: Any, name: str, **arguments: Any) -> Method:
        """This plan on an engine.

        Args:
            engine: A compiled pipeline.
            name: Name of the method.
            arguments: Further arguments of the engine's call.
        """
        placed = {} if self.sigmas is None else {"sigmas": list(self.sigmas)}
        return engine_method(
            name,
            self.label,
            engine,
            patch_policy=self.policy,
            num_inference_steps=self.num_inference_steps,
            step_cache=self.step_cache,
            **placed,
            **arguments,
        )


def full_resolution(steps: int) -> Candidate:
    """Every step at p: the reference of everything."""
    return Candidate(
        kind=FINE, label=f"{steps} steps at p", policy=FinePolicy(), num_inference_steps=steps
    )


def placed_levels(steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels of the steps, before the scheduler's own shift.

    Args:
        steps: Number of steps N.
        shift: s of the map s x / (1 + (s - 1) x) over evenly spaced levels from 1 to 1/N: above 1
            more of the steps are at high noise, below 1 at low noise.
    """
    even = (1 - step / steps for step in range(steps))
    return tuple(round(shift * x / (1 + (shift - 1) * x), 6) for x in even)


def cache_text(cache: StepCache) -> str:
    """A step cache in a few words: `"TeaCache 0.3, first 3"`; empty for none."""
    if isinstance(cache, NoCache):
        return ""
    values: Sequence[tuple[Any, Any]] = [(one, getattr(cache, one.name)) for one in fields(cache)]  # type: ignore[arg-type]
    named = [
        f"{field.name} {value:.3g}" if isinstance(value, float) else f"{field.name} {value}"
        for field, value in values
        if field.name != "threshold" and value != field.default and not isinstance(value, tuple)
    ]
    threshold = [f" {value:.3g}" for field, value in values if field.name == "threshold"]
    planned = [
        f"{sum(value)} of {len(value)} steps compute"
        for field, value in values
        if field.name == "plan" and isinstance(value, tuple)
    ]
    return ", ".join([f"{type(cache).__name__}{''.join(threshold)}", *planned, *named])
