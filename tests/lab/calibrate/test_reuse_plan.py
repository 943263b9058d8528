"""Which steps should compute: against every other choice, and on a real engine."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from models import prompting_pipeline

import ddit_rt
from ddit_rt import FinePolicy, StaticCache
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.lab.plans.reuse_plan import Drift, measured_drift
from ddit_rt.lab.plans.step_caches import STEP_CACHES, CacheDial

SIZE = {"height": 64, "width": 64}


def drift_of(residuals: np.ndarray, levels: np.ndarray) -> Drift:
    products = residuals @ residuals.T
    return Drift(levels=tuple(levels), products=tuple(map(tuple, products)))


def walk(steps: int, ends: tuple[float, float] = (2, 0.2)) -> tuple[np.ndarray, np.ndarray]:
    """Residuals that drift, by default fast at first, and noise levels that fall unevenly."""
    rng = np.random.default_rng(0)
    rates = np.linspace(*ends, steps)[:, None]
    levels = 1 - np.linspace(0, 1, steps + 1) ** 1.3
    return np.cumsum(rng.normal(size=(steps, 40)) * rates, axis=0), levels


def loss_of(
    plan: tuple[bool, ...], residuals: np.ndarray, levels: np.ndarray, growth: float
) -> float:
    """Of the stretches between computed steps, the summed squares of what each is off by."""
    latest = previous = 0
    total, off = 0.0, np.zeros(residuals.shape[1])
    for step, computes in enumerate(plan):
        if computes:
            total, off = total + float(off @ off), np.zeros_like(off)
            previous, latest = (latest, step) if step else (0, 0)
            continue
        gap = levels[latest] - levels[previous]
        weight = (levels[step] - levels[latest]) / gap if gap else 0.0
        guess = residuals[latest] + weight * (residuals[latest] - residuals[previous])
        width = (levels[step + 1] - levels[step]) * np.exp(growth * levels[step])
        off = off + width * (guess - residuals[step])
    return total + float(off @ off)


@pytest.mark.parametrize("growth", [0.0, 2.0])
def test_no_other_steps_that_compute_are_better(growth: float) -> None:
    steps = 8
    residuals, levels = walk(steps)
    drift = drift_of(residuals, levels)
    for computed in range(1, steps + 1):
        found = drift.plan(steps, computed, growth=growth)
        every = [
            tuple(step == 0 or step in chosen for step in range(steps))
            for chosen in itertools.combinations(range(1, steps), computed - 1)
        ]
        assert found in every
        best = min(loss_of(plan, residuals, levels, growth) for plan in every)
        assert loss_of(found, residuals, levels, growth) == pytest.approx(best)


def test_where_residuals_do_not_change_any_steps_may_reuse() -> None:
    levels = np.linspace(1, 0, 7)
    drift = drift_of(np.ones((6, 3)), levels)
    plan = drift.plan(6, 2)
    assert plan[0]
    assert sum(plan) == 2


def test_early_errors_that_grow_draw_the_computed_steps_to_the_start() -> None:
    residuals, levels = walk(24, (1, 1))
    drift = drift_of(residuals, levels)
    middles = [np.flatnonzero(drift.plan(24, 10, growth=g)).mean() for g in (0.0, 2.0, 6.0)]
    assert middles[0] > middles[1] > middles[2]


@pytest.mark.parametrize(("steps", "shift"), [(12, 1.0), (24, 2.0), (7, 0.5)])
def test_a_run_of_other_levels_gets_a_plan_from_those_that_are_known(
    steps: int, shift: float
) -> None:
    residuals, levels = walk(24)
    drift = drift_of(residuals, levels)
    found, products = drift.at(steps, shift)
    assert len(found) == steps + 1
    assert found[0] == pytest.approx(levels[0])
    assert found[-1] == levels[-1]
    assert np.all(np.diff(found) < 0)
    assert np.linalg.eigvalsh(products).min() > -1e-6
    assert sum(drift.plan(steps, 5, shift=shift)) == 5
    own, same = drift.at(24, 1.0)
    np.testing.assert_allclose(own, levels, atol=1e-5)  # placed to six digits
    np.testing.assert_allclose(same, np.array(drift.products), rtol=1e-3, atol=1e-2)


def test_drift_of_an_engine_comes_back_from_json_and_says_which_steps_matter() -> None:
    engine = ddit_rt.compile(
        prompting_pipeline(), **SIZE, patch_sizes=("p", "2p"), backend="eager", progress=False
    )
    steps, prompt = 20, Prompt(text="a zebra", seed=3)
    drift = measured_drift(engine, prompt, {"num_inference_steps": steps})
    assert Drift.of(json.loads(json.dumps(asdict(drift)))) == drift
    assert np.trace(np.array(drift.products)) == pytest.approx(steps)
    assert len(drift.levels) == steps + 1

    def latents(**more: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        made = engine(
            "a fox",
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
            patch_policy=FinePolicy(),
            **more,
        )
        return made.images

    whole = latents()

    def off(cache: StaticCache) -> float:
        return float((latents(step_cache=cache) - whole).norm())

    planned, other = drift.plan(steps, 8), drift.plan(steps, 8)[::-1]
    assert off(StaticCache(planned, first=1, last=0)) < off(StaticCache(other, first=1, last=0))
    assert engine.last_trace is not None
    assert engine.last_trace.reused <= steps - 8


def test_a_dial_with_a_drift_turns_the_number_of_steps_that_compute() -> None:
    residuals, levels = walk(24)
    dial: CacheDial = STEP_CACHES[-1].planned(drift_of(residuals, levels))
    counts = [round(24 * dial.cost_share(level, (), 24)) for level in (0, 16, 32, 48)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 22
    assert counts[-1] == 3
    early, late = (dial.at(30, (("growth", growth),), steps=24) for growth in (0.0, 3.0))
    assert isinstance(early, StaticCache)
    assert early != late
    assert dial.at(30, steps=12, shift=2.0) != dial.at(30, steps=12)
