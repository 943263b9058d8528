"""Images of plans on a demo model, made once and kept, and what a step costs.

Plans that decide run each prompt in a launch of its own, since a batch shares its decisions. Static
ones may run in batches, where images are the same up to rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_paths import TRAINING_FREE, CoarsePath
from torch import Tensor

import ddit_rt
from ddit_rt import ops
from ddit_rt.lab.measure.timing import (
    Batch,
    Generation,
    Method,
    Pixels,
    Sample,
    on_trial,
)
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.lab.plans.dial import branch, step_costs
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.lab.plans.step_caches import alternating
from ddit_rt.loop import RunTrace
from ddit_rt.policies import FinePolicy, NoCache, PatchPolicy, StaticPolicy, StepCache

QUANTILE, MEAN = "quantile", "mean"
SEARCH_SEED = 50_000
_SCHEMA = 3
_NOT_DRAWING = frozenset({"cli", "lab"})
"""Parts of the package that no image of the benchmark passes through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Candidate):
    """A plan, and what else the tables vary.

    Attributes:
        kind: What a table calls plans of its shape.
        label: The plan in a few words.
        path: Which coarse step it takes: a key of `Runs.paths`.
        statistic: How a dynamic policy reduces the patches' deviations: the paper says why by a
            quantile, as the native scores do, and not by their mean.
    """

    kind: str = ""
    label: str = ""
    path: str = TRAINING_FREE
    statistic: str = QUANTILE

    def to_dict(self) -> dict[str, Any]:
        """Its part of a row, JSON-ready."""
        policy = self.policy.to_dict()
        if self.statistic != QUANTILE:
            policy["statistic"] = self.statistic
        return {"policy": policy, "steps": self.num_inference_steps, "path": self.path}


def reference(steps: int) -> Plan:
    """Full resolution, at which every path is the unmodified model."""
    label = f"{steps} steps at full resolution"
    return Plan(kind="fine", label=label, policy=FinePolicy(), num_inference_steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What a plan made of some prompts, in their order.

    Attributes:
        images: One per prompt.
        branches: What every step did for each, such as `"2p"` or `"2p reused"`.
    """

    images: list[Pixels]
    branches: list[list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """What one step costs.

    Attributes:
        milliseconds: By path, and by class of a step cache, then by branch.
        tokens: Image tokens by patch size.
    """

    milliseconds: dict[str, dict[str, float]]
    tokens: dict[str, float]

    def loop_ms(self, plan: Plan, branches: Sequence[str]) -> float:
        """Milliseconds of a loop; a step at p costs the same on every path."""
        cached = type(plan.step_cache).__name__
        if cached in self.milliseconds:
            return sum(self.milliseconds[cached][one] for one in branches)
        own, fine = self.milliseconds[plan.path], self.milliseconds[TRAINING_FREE]["p"]
        costs = {one: mixed_cost(fine, own[one], plan.policy.fine_share) for one in own}
        return sum(fine if one == "p" else costs[one] for one in branches)

    def loop_tokens(self, branches: Sequence[str]) -> float:
        """Image tokens of a loop; a step that reuses counts as none."""
        return sum(self.tokens.get(one, 0) for one in branches)


def mixed_cost(fine: float, coarse: float, fine_share: float) -> float:
    """Of a step that keeps a share of the regions at p: exact for tokens, near it for time.

    Args:
        fine: Cost of a step at p.
        coarse: Of the coarse step without the share.
        fine_share: The share.
    """
    return fine_share * fine + (1 - fine_share) * coarse


@dataclass(kw_only=True)
class Runs:
    """Runs plans.

    Attributes:
        paths: By name, `TRAINING_FREE` among them.
        arguments: Further arguments of an engine's call.
        folder: For what was made; None keeps nothing. Every file is named by a hash of the plan,
            the prompts, the model, the adapters and the package's code.
        batch: Images that static plans make at once.
    """

    paths: Mapping[str, CoarsePath]
    arguments: Mapping[str, Any]
    folder: Path | None = None
    batch: int = 4
    _memory: dict[str, Made] = field(default_factory=dict, repr=False)

    def run(self, plan: Plan, prompts: Sequence[Prompt]) -> Made:
        """What a plan makes."""
        drawn = [asdict(prompt) for prompt in prompts]
        key = self._key(plan.path, [plan.key, plan.statistic, drawn])
        if key not in self._memory:
            self._memory[key] = self._load(key) or self._generate(plan, prompts, key)
        return self._memory[key]

    def method(self, plan: Plan) -> Method:
        """A plan, to be timed beside others."""
        return on_trial(plan.on(self.paths[plan.path].engine, plan.label, **self.arguments))

    def trace(self, plan: Plan, prompt: Prompt) -> RunTrace:
        """The trace of a run whose images do not count."""
        return trace_of(self.method(plan).generate(batch_of([prompt])))

    def costs(
        self,
        steps: int,
        prompt: Prompt,
        repeats: int,
        caches: Sequence[StepCache] = (),
        unit: str = "ms",
    ) -> StepCosts:
        """Cost of one step, by path or step cache: medians over the steps of static runs."""
        known = [steps, asdict(prompt), repeats, torch.get_num_threads(), unit]
        known.append([cache.to_dict() for cache in caches])
        key = "-".join(self._key(name, known)[:8] for name in self.paths)
        path = self._file(key, "json")
        if path is not None and path.exists():
            return StepCosts(**json.loads(path.read_text(encoding="utf-8")))
        costs = self._measure_costs(steps, prompt, repeats, caches, unit)
        if path is not None:
            path.write_text(json.dumps(asdict(costs)), encoding="utf-8")
        return costs

    def _measure_costs(
        self, steps: int, prompt: Prompt, repeats: int, caches: Sequence[StepCache], unit: str
    ) -> StepCosts:
        tables: dict[str, tuple[str, StepCache]] = {name: (name, NoCache()) for name in self.paths}
        tables |= {type(one).__name__: (TRAINING_FREE, alternating(one)) for one in caches}

        sizes = [
            bucket.patch for bucket in self.paths[TRAINING_FREE].engine.artifact.manifest.buckets
        ]

        def measure(path: str, cache: StepCache, unit: str, rounds: int = 1) -> dict[str, float]:
            def run(policy: PatchPolicy, chosen: StepCache) -> RunTrace:
                plan = Plan(policy=policy, num_inference_steps=steps, path=path, step_cache=chosen)
                return self.trace(plan, prompt)

            return step_costs(run, sizes, steps, cache=cache, unit=unit, rounds=rounds)

        return StepCosts(
            milliseconds={name: measure(*how, unit, repeats) for name, how in tables.items()},
            tokens=measure(TRAINING_FREE, NoCache(), "tokens"),
        )

    def _generate(self, plan: Plan, prompts: Sequence[Prompt], key: str) -> Made:
        still = isinstance(plan.policy, StaticPolicy) and isinstance(plan.step_cache, NoCache)
        size = self.batch if still else 1
        made, method = Made(images=[], branches=[]), self.method(plan)
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            with scored_by(plan.statistic):
                result = method.generate(batch_of(part))
            made.images.extend(result.outputs)
            made.branches.extend([[branch(step) for step in trace_of(result)]] * len(part))
        path = self._file(key, "npz")
        if path is not None:
            partial = path.with_suffix(".part.npz")
            branches = json.dumps(made.branches)
            np.savez_compressed(partial, images=np.stack(made.images), branches=branches)
            partial.replace(path)  # whole or not at all
        return made

    @cached_property
    def _code(self) -> str:
        return code_fingerprint()

    def _key(self, path: str, content: Any) -> str:
        chosen = self.paths[path]
        model = chosen.engine.artifact.manifest.weights, chosen.fingerprint
        text = json.dumps([_SCHEMA, path, content, dict(self.arguments), self._code, model])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _load(self, key: str) -> Made | None:
        path = self._file(key, "npz")
        if path is None or not path.exists():
            return None
        with np.load(path) as data:
            branches = json.loads(str(data["branches"]))
            return Made(images=list(data["images"]), branches=branches)

    def _file(self, key: str, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.{suffix}"


@contextmanager
def scored_by(statistic: str) -> Iterator[None]:
    """Lets the CPU's step loop reduce patches by another statistic than the native quantile.

    The loop asks `ops.patch_scores` for its scores; while this lasts, it gets those of a mean.
    """
    native = ops.patch_scores
    if statistic == MEAN:
        ops.patch_scores = mean_scores
    try:
        yield
    finally:
        ops.patch_scores = native


def mean_scores(
    history: Tensor, patch_sizes: Sequence[int], quantile: float, order: int = 3, head: int = 0
) -> Tensor:
    """As `ops.patch_scores`, by the mean over the patches; the quantile is no part of it."""
    del quantile
    weights = {1: (1, -1), 2: (1, -2, 1), 3: (1, -3, 3, -1)}[order]
    recent = [history[(head + age) % len(history)].double() for age in range(order + 1)]
    difference = torch.stack([w * z for w, z in zip(weights, recent, strict=True)]).sum(0)
    batch, channels, height, width = difference.shape
    scores = []
    for size in patch_sizes:
        split = difference.view(batch, channels, height // size, size, width // size, size)
        patches = split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        scores.append(patches.std(-1).mean(-1))
    return torch.stack(scores, dim=-1).float()


def seeded(texts: Sequence[str], seed: int = 0) -> tuple[Prompt, ...]:
    """Prompts, each with a seed of its own, from a first one on."""
    return tuple(Prompt(text=text, seed=seed + place) for place, text in enumerate(texts))


def batch_of(prompts: Sequence[Prompt]) -> Batch:
    """Prompts in one call."""
    return Batch(
        prompts=tuple(prompt.text for prompt in prompts),
        seeds=tuple(prompt.seed for prompt in prompts),
    )


def trace_of(made: Generation | Sample) -> RunTrace:
    """The trace of an engine's run."""
    assert made.trace is not None, "an engine's run has a trace"
    return made.trace


def code_fingerprint() -> str:
    """SHA-256 of the code that draws, so that images of another state of it do not count."""
    digest = hashlib.sha256()
    package = Path(ddit_rt.__file__).parent
    drawing = (
        path
        for path in sorted(package.rglob("*"))
        if path.suffix in (".py", ".so") and path.relative_to(package).parts[0] not in _NOT_DRAWING
    )
    for path in (*drawing, Path(__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
