"""Pictures or clips of plans on a demo model, made once and kept, and what a step costs by size.

Plans that decide run each picture in a launch of its own, since a batch shares its decisions.
Static ones may run in batches, where pictures are the same up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import quality_loop
import torch
from quality_loop import HostRule, host_model, offered_multiples, run_host_rule
from quality_paths import TRAINING_FREE, CoarsePath

import ddit_rt
from ddit_rt.lab.measure.timing import Batch, Pixels, engine_method
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.policies import FinePolicy, PatchPolicy, StaticPolicy
from ddit_rt.steps import StepModel

_SCHEMA = 1

_NOT_DRAWING = frozenset({"calibration", "cli", "evaluation", "training"})
"""Parts of the package that no picture of the benchmark passes through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to make pictures.

    Attributes:
        policy: Patch size of each step; or a rule that only the benchmark's own loop runs.
        steps: Denoising steps.
        path: Which coarse step it takes: a key of `PictureRuns.paths`.
    """

    policy: PatchPolicy | HostRule
    steps: int
    path: str = TRAINING_FREE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"policy": self.policy.to_dict(), "steps": self.steps, "path": self.path}


def fine(steps: int) -> Plan:
    """All steps at p, where every path is the unmodified model."""
    return Plan(policy=FinePolicy(), steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What a plan made of some prompts, in their order.

    Attributes:
        pictures: One per prompt.
        sizes: Patch size of every step of each picture, by name.
        loop_ms: Wall time of each picture's denoising loop; empty where they ran in batches.
    """

    pictures: list[Pixels]
    sizes: list[list[str]]
    loop_ms: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """What one step costs.

    Attributes:
        milliseconds: By path and patch size.
        tokens: Image tokens by patch size.
    """

    milliseconds: dict[str, dict[str, float]]
    tokens: dict[str, int]

    def loop_ms(self, path: str, sizes: Sequence[str]) -> float:
        """Milliseconds of a loop; a step at p costs the same on every path."""
        own, base = self.milliseconds[path], self.milliseconds[TRAINING_FREE]
        return sum(base["p"] if size == "p" else own[size] for size in sizes)

    def loop_tokens(self, sizes: Sequence[str]) -> int:
        """Image tokens of a loop."""
        return sum(self.tokens[size] for size in sizes)


@dataclass(kw_only=True)
class PictureRuns:
    """Runs plans.

    Attributes:
        paths: By name, `TRAINING_FREE` among them.
        arguments: Further arguments of an engine's call.
        cache: Folder for what was made; None keeps nothing. Every file is named by a hash of the
            plan, the prompts, the model, the adapters and the package's code.
        batch: Pictures that static plans make at once.
        generated: Pictures that were made, not found.
    """

    paths: Mapping[str, CoarsePath]
    arguments: Mapping[str, Any]
    cache: Path | None = None
    batch: int = 4
    generated: int = 0
    _memory: dict[str, Pictures] = field(default_factory=dict, repr=False)

    def run(self, plan: Plan, prompts: Sequence[Prompt]) -> Pictures:
        """The pictures of a plan."""
        key = self._key(plan.path, [plan.to_dict(), _entries(prompts)])
        if key not in self._memory:
            self._memory[key] = self._load(key) or self._generate(plan, prompts, key)
        return self._memory[key]

    def costs(self, steps: int, prompt: Prompt, repeats: int) -> StepCosts:
        """Cost of one step, by path and patch size.

        Medians over all steps of static runs, in interleaved rounds, so that a machine that
        slows down meanwhile does so for all of them alike.
        """
        settings = [steps, _entries([prompt]), repeats, torch.get_num_threads()]
        path = self._file("-".join(self._key(name, settings)[:8] for name in self.paths), "json")
        if path is not None and path.exists():
            return StepCosts(**json.loads(path.read_text(encoding="utf-8")))
        costs = self._measure_costs(steps, prompt, repeats)
        if path is not None:
            path.write_text(json.dumps(asdict(costs)), encoding="utf-8")
        return costs

    def _measure_costs(self, steps: int, prompt: Prompt, repeats: int) -> StepCosts:
        times: dict[str, dict[str, list[float]]] = {name: {} for name in self.paths}
        tokens: dict[str, int] = {}
        for index in range(repeats + 1):
            for name, path in self.paths.items():
                for size in (entry.patch for entry in path.engine.artifact.manifest.buckets):
                    plan = Plan(policy=StaticPolicy([size] * steps), steps=steps, path=name)
                    self._engine_batch(plan, [prompt])
                    trace = path.engine.last_trace
                    tokens[size] = trace[0].tokens
                    if index:  # the first round warms up
                        times[name].setdefault(size, []).extend(s.latency_ms for s in trace)
        medians = {
            name: {size: statistics.median(values) for size, values in by_size.items()}
            for name, by_size in times.items()
        }
        return StepCosts(milliseconds=medians, tokens=tokens)

    def _generate(self, plan: Plan, prompts: Sequence[Prompt], key: str) -> Pictures:
        make = self._host_batch if isinstance(plan.policy, HostRule) else self._engine_batch
        size = self.batch if isinstance(plan.policy, StaticPolicy) else 1
        made = Pictures(pictures=[], sizes=[], loop_ms=[])
        for start in range(0, len(prompts), size):
            part = make(plan, prompts[start : start + size])
            made.pictures.extend(part.pictures)
            made.sizes.extend(part.sizes)
            made.loop_ms.extend(part.loop_ms if size == 1 else ())
        self.generated += len(prompts)
        path = self._file(key, "npz")
        if path is not None:
            partial = path.with_suffix(".part.npz")
            record = json.dumps([made.sizes, made.loop_ms])
            np.savez_compressed(partial, pictures=np.stack(made.pictures), record=record)
            partial.replace(path)  # whole or not at all
        return made

    def _engine_batch(self, plan: Plan, prompts: Sequence[Prompt]) -> Pictures:
        arguments = {"num_inference_steps": plan.steps, **self.arguments}
        engine = self.paths[plan.path].engine
        contender = engine_method("", "", engine, patch_policy=plan.policy, **arguments)
        texts, seeds = zip(*_entries(prompts), strict=True)
        made = contender.generate(Batch(prompts=texts, seeds=seeds))
        assert made.trace is not None, "an engine's run has a trace"
        return Pictures(
            pictures=list(made.outputs),
            sizes=[made.trace.patch_sizes()] * len(prompts),
            loop_ms=[made.trace.latency_ms],
        )

    def _host_batch(self, plan: Plan, prompts: Sequence[Prompt]) -> Pictures:
        if plan.path != TRAINING_FREE:
            raise ValueError(f"got the path {plan.path!r}; a host rule runs {TRAINING_FREE!r} only")
        assert isinstance(plan.policy, HostRule)
        engine = self.paths[plan.path].engine
        arguments = {"num_inference_steps": plan.steps, **self.arguments}
        (prompt,) = prompts
        picture, sizes, loop_ms = run_host_rule(
            self._host_model,
            engine.pipeline,
            plan.policy,
            offered_multiples(engine),
            prompt,
            arguments,
        )
        return Pictures(pictures=[picture], sizes=[sizes], loop_ms=[loop_ms])

    @cached_property
    def _host_model(self) -> StepModel:
        return host_model(self.paths[TRAINING_FREE].engine)

    @cached_property
    def _code(self) -> str:
        return code_fingerprint()

    def _key(self, path: str, content: Any) -> str:
        chosen = self.paths[path]
        model = chosen.engine.artifact.manifest.weights, chosen.fingerprint
        text = json.dumps([_SCHEMA, content, dict(self.arguments), self._code, model])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _load(self, key: str) -> Pictures | None:
        path = self._file(key, "npz")
        if path is None or not path.exists():
            return None
        with np.load(path) as data:
            sizes, loop_ms = json.loads(str(data["record"]))
            return Pictures(pictures=list(data["pictures"]), sizes=sizes, loop_ms=loop_ms)

    def _file(self, key: str, suffix: str) -> Path | None:
        return None if self.cache is None else self.cache / f"{key}.{suffix}"


def code_fingerprint() -> str:
    """SHA-256 of the code that draws, so that pictures of another state of it do not count."""
    digest = hashlib.sha256()
    package = Path(ddit_rt.__file__).parent
    drawing = (
        path
        for path in sorted(package.rglob("*"))
        if path.suffix in (".py", ".so") and path.relative_to(package).parts[0] not in _NOT_DRAWING
    )
    for path in (*drawing, Path(quality_loop.__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _entries(prompts: Sequence[Prompt]) -> list[tuple[str, int]]:
    return [(prompt.text, prompt.seed) for prompt in prompts]
