"""Ways to run the same denoising loop: diffusers, what diffusers offers for speed, and ddit_rt.

All go through the call of the same pipeline class with the same embeddings, noise, steps and dtype,
without text encoders and VAE, and all read the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from real_models import Case, DiffusersCache
from real_plans import cache_of, policy_of
from real_setup import Setup, captures_of
from timing import Call
from torch import Tensor

BASELINE = "diffusers_eager"


def no_details() -> dict[str, Any]:
    """Of a method that always does the same."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to run the loop.

    Attributes:
        label: Name for people.
        build: Makes its call, which returns final latents.
        schedule: One of the model's.
        executor: Form of our executor; None for diffusers.
        details: What its calls did, asked after the last of them.
    """

    label: str
    build: Callable[[], Call]
    schedule: str = "fine"
    executor: str | None = None
    details: Callable[[], dict[str, Any]] = no_details


def all_methods(setup: Setup, case: Case) -> dict[str, Method]:
    """Everything that the benchmark compares, the baseline first.

    What takes longest to get ready comes last: if time runs out, the others are measured.
    """
    cached = CachedCall(setup, case, setup.model.cache(case.steps))
    return {
        BASELINE: Method(
            label="diffusers, eager", build=lambda: _call(setup, case, setup.pipeline)
        ),
        **engine_methods(setup, case),
        cached.cache.name: Method(
            label=cached.cache.label, build=cached.build, details=cached.details
        ),
        **compiled_methods(setup, case),
    }


def compiled_methods(setup: Setup, case: Case) -> dict[str, Method]:
    """Compiled by torch: block by block, as diffusers recommends, and whole.

    `max-autotune` only on CUDA, without Inductor's own CUDA graphs: on CPUs it tunes for minutes
    and its templates lose to MKL.
    """
    modes: dict[str, str | None] = {"": None}
    if setup.device.type == "cuda" and setup.model.name == "flux":
        modes["_max_autotune"] = "max-autotune-no-cudagraphs"
    return {
        f"compile_{scope}{suffix}": Method(
            label=f"diffusers + torch.compile ({scope}{', ' + mode if mode else ''})",
            build=partial(_compiled, setup, case, scope, mode),
        )
        for scope in ("regional", "full")
        for suffix, mode in modes.items()
    }


def engine_methods(setup: Setup, case: Case) -> dict[str, Method]:
    """Every schedule in every form of our executor."""
    methods = {}
    for form in setup.executors:
        for schedule in setup.model.schedules:
            call = EngineCall(setup, case, schedule, form)
            methods[f"ddit_rt_{form}_{schedule}"] = Method(
                label=f"ddit_rt, {schedule}",
                build=call.build,
                schedule=schedule,
                executor=form,
                details=call.details,
            )
    return methods


def _call(setup: Setup, case: Case, pipeline: Any) -> Call:
    arguments = setup.request(case)
    return lambda: setup.model.latents(pipeline(**arguments))


def _compiled(setup: Setup, case: Case, scope: str, mode: str | None) -> Call:
    pipeline = setup.model.with_shared_weights(setup.pipeline)
    if scope == "regional":
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, mode=mode)
    else:
        pipeline.transformer.compile(mode=mode)
    return _call(setup, case, pipeline)


@dataclass
class CachedCall:
    """A cache of diffusers, whose hooks decide in Python, so that it runs uncompiled.

    Attributes:
        setup: The run of the script.
        case: The request.
        cache: The cache.
    """

    setup: Setup
    case: Case
    cache: DiffusersCache
    _ran: int = 0

    def build(self) -> Call:
        """The call, after one that was counted."""
        pipeline = self.setup.model.with_shared_weights(self.setup.pipeline)
        transformer = pipeline.transformer
        transformer.enable_cache(self.cache.config)
        call = _call(self.setup, self.case, pipeline)
        self._ran = 0
        layer = transformer.get_submodule(self.cache.layer)
        hook = layer.register_forward_pre_hook(self._count)
        call()
        hook.remove()
        return call

    def details(self) -> dict[str, Any]:
        """How many steps of the counted call ran all blocks, and the share that did not."""
        computed = self._ran // self.setup.model.passes
        return {"computed_steps": computed, "reused_share": 1 - computed / self.case.steps}

    def _count(self, _module: Any, _inputs: Any) -> None:
        self._ran += 1


class EngineCall:
    """One schedule in one form of our executor; keeps what it did."""

    def __init__(self, setup: Setup, case: Case, schedule: str, form: str) -> None:
        self._setup, self._case = setup, case
        self._schedule, self._form = schedule, form
        self._calls = self._late_captures = 0
        self._trace: Any = None

    def build(self) -> Call:
        """The call."""
        setup = self._setup
        setup.need_engine()
        request = setup.request(self._case)
        policy = policy_of(self._schedule, setup.flops(self._case), self._case.steps)
        cache = cache_of(self._schedule)

        def call() -> Tensor:
            before = captures_of(setup.engine)
            latents = setup.generate(request, policy, self._form, cache)
            self._calls += 1
            self._late_captures += self._calls > 1 and captures_of(setup.engine) != before
            self._trace = setup.engine.last_trace
            return latents

        return call

    def details(self) -> dict[str, Any]:
        """Patch sizes, reuse, tokens and notes of the latest run, and how it was executed."""
        trace = self._trace
        return {
            "ran_on": trace.executor,
            "patch_sizes": _counts(trace.patch_sizes()),
            "computed_sizes": _counts([step.patch_size for step in trace if not step.reused]),
            "reused_share": trace.reused / len(trace),
            "tokens": trace.tokens,
            "notes": list(trace.notes),
            # Other than 0: graphs were captured again while others were timed.
            "late_captures": self._late_captures,
        }


def _counts(sizes: Sequence[str]) -> dict[str, int]:
    """In the order in which they come up."""
    return {size: sizes.count(size) for size in dict.fromkeys(sizes)}
