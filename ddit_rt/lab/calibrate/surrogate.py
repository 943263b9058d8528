"""What a plan should cost and lose, learnt from those that were measured: Gaussian processes.

Their prior is a plane and smooth bumps over the parts of a genome, on the logarithms of the loss
and of the cost, so that they say what parts do together too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddit_rt.lab.plans.genome import TAU_LEVELS, Genome, Rule, Static
from ddit_rt.lab.plans.step_caches import LEVELS, CacheDial
from ddit_rt.policies import parse_patch

Array = npt.NDArray[np.floating[Any]]
Normal = tuple[float, float]
"""Mean and standard deviation."""

_LENGTHS = (0.5, 1.0, 2.0)
"""Lengths of bumps that are tried, in units of the features, which are about 1 each."""
_NOISES = (1e-3, 1e-2, 1e-1)
"""Shares of the variance that the plans' own parts do not explain."""


class Surrogate:
    """Gaussian processes over the same genomes; of each one's hyperparameters the likeliest.

    Args:
        features: Of the measured plans, `[n, d]`.
    """

    def __init__(self, features: Array) -> None:
        self._x = features
        distance = _distances(features, features)
        plane, noises = _plane(features, features), np.eye(len(features))
        self._roots = {
            (length, noise): np.linalg.cholesky(_bumps(distance, length) + plane + noise * noises)
            for length, noise in itertools.product(_LENGTHS, _NOISES)
        }

    def predict(self, places: Array, *measured: Sequence[float]) -> list[list[Normal]]:
        """What the values of other plans should be.

        Args:
            places: Features of these plans, `[m, d]`.
            measured: One or more values of the measured plans, `[n]` each.

        Returns:
            A list for each of `measured`.
        """
        distance, plane = _distances(self._x, places), _plane(self._x, places)
        prior = 2.0 + (places**2).sum(axis=1)
        found = []
        for values in measured:
            y = np.asarray(values, dtype=np.float64)
            mean, scale = float(y.mean()), float(y.std()) or 1.0
            length, root, solved = self._likeliest((y - mean) / scale)
            cross = np.linalg.solve(root, _bumps(distance, length) + plane)
            left = np.maximum(prior - (cross**2).sum(axis=0), 1e-12)
            means, deviations = cross.T @ solved * scale + mean, np.sqrt(left) * scale
            found.append(list(zip(means.tolist(), deviations.tolist(), strict=True)))
        return found

    def _likeliest(self, y: Array) -> tuple[float, Array, Array]:
        """Length of the bumps, root of the kernel, and what that makes of `y`."""
        best = -math.inf
        for (length, _), root in self._roots.items():
            solved = np.linalg.solve(root, y)
            likelihood = -0.5 * float(solved @ solved) - float(np.log(np.diag(root)).sum())
            if likelihood > best:
                best, chosen = likelihood, (length, root, solved)
        return chosen


def _distances(one: Array, other: Array) -> Array:
    squares: Array = ((one[:, None] - other[None]) ** 2).sum(axis=-1)
    return squares


def _bumps(distance: Array, length: float) -> Array:
    bumps: Array = np.exp(-distance / (2 * length**2))
    return bumps


def _plane(one: Array, other: Array) -> Array:
    plane: Array = one @ other.T + 1.0
    return plane


def features(genome: Genome, steps: int, dials: Sequence[CacheDial]) -> list[float]:
    """A genome as numbers of about 1, `[d]`.

    Args:
        genome: The plan.
        steps: Steps of the reference.
        dials: Step caches of the search.
    """
    values = [math.log2(steps / genome.steps), math.log2(genome.shift)]
    values += _of_static(genome) + _of_rule(genome.patches)
    for dial in dials:
        reuse = genome.reuse
        own = reuse if reuse is not None and reuse.dial.name == dial.name else None
        changed = dict(own.changed) if own else {}
        values += [1.0, own.level / LEVELS] if own else [0.0, 0.0]
        values += [_changed(changed.get(name), tried) for name, tried in dial.varied.items()]
    return values


def _of_static(genome: Genome) -> list[float]:
    patches = genome.patches
    if not isinstance(patches, Static):
        return [0.0] * 5
    weights = {size: math.log2(parse_patch(size)) for size in ("p", *patches.sizes)}
    plan = [weights[size] for size in patches.plan(genome.steps)]
    coarse = sum(size > 0 for size in plan) / len(plan)
    where = sum(place * (size > 0) for place, size in enumerate(plan)) / len(plan) ** 2
    refreshes = 0.0 if patches.refresh is None else 1 / (1 + patches.refresh)
    return [coarse, sum(plan) / len(plan), 2 * where, refreshes, patches.head / 5]


def _of_rule(patches: Static | Rule | None) -> list[float]:
    if not isinstance(patches, Rule):
        return [0.0] * 6
    policy = patches.policy
    refreshes = 0.0 if policy.refresh is None else 1 / (1 + policy.refresh)
    warm = float(policy.warmup == "coarse")
    level = patches.level / TAU_LEVELS
    return [1.0, level, refreshes, policy.fine_tail / 4, warm, len(patches.factors) / 2]


def _changed(value: Any, tried: Sequence[Any]) -> float:
    """0 of the cache's own value, else the place among those that are tried."""
    return 0.0 if value is None else (1 + tried.index(value)) / len(tried)
