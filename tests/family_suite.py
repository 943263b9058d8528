"""What holds for every family whose model's own forward runs the steps.

`FamilySuite` is for every family: it runs whatever the family's own file decides.

- Steps at p equal diffusers, by the table and by the pipeline's own loop: layouts, sizes, times,
  shifts, guidance, which passes come in a call.
- Coarse steps: arguments that hang on the size, in both ways to drive.
- Captured steps equal the CPU's: what of the conditioning a captured step reads.
- A step cache: where image tokens are in what the blocks give.
- LoRA, times in half precision, `denoise`, cost and memory: names, dtypes and shapes of arguments.
- Compiled blocks: what was read off the forward is enough for packages. They are compiled once
  for all pipelines of a transformer class.

`LoopSuite` is for what no family's file decides, but the loop and the engine, on few of them: a
distilled one (FLUX.2 dev), one with guidance, in one pass and in two (Qwen-Image), one with two
experts (Wan A14B), and one that the pipeline's own loop drives (LTX-2).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from driving import FINE, assert_equal, keep, latents_of, made, runs
from made_once import Packages
from models import noise, seeded
from torch import Tensor, nn

import ddit_rt
from ddit_rt import DDiTPolicy, Engine, FirstBlockCache, MagCache, StaticPolicy, TokenRanges
from ddit_rt.engine.cost import step_cost
from ddit_rt.engine.memory import memory_of
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.lab.calibrate.cache_fit import measuring_plan, watch
from ddit_rt.loop import CudaExecutor
from ddit_rt.models import family_of
from ddit_rt.steps import StepModel

STEPS = 4
MIXED = StaticPolicy(["p", "2p", "2p", "p"])
OTHER = StaticPolicy(["2p", "p", "2p", "p"])
WAYS: tuple[dict[str, Any], ...] = ({}, {"callback_on_step_end": keep})
"""To drive a run: by the table, and by the pipeline's own loop."""
CACHE = MagCache(0.9, retention_ratio=0.0, max_skip_steps=2, mag_ratios=(1.0,) * STEPS)
RANGES = TokenRanges(batch=(1, 4), image=(4, 49152))
"""Two prompts with guidance; tokens of the default size of every family."""
TIME_EMBEDDERS = {
    "Timesteps",
    "TimestepEmbedder",
    "AudioDiTTimestepEmbedding",
    "Krea2TimestepEmbedding",
}
"""Classes of diffusers that are given the time as a number."""
TOLERANCE = 1e-5
"""Of the latents' scale, in float32: passes of guidance as one batch round differently."""


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """A tiny model of a real class, and how to ask for pictures.

    Attributes:
        pipeline: Makes a pipeline; always of the same weights.
        prompts: Arguments of a call with one prompt of each of the given lengths, by a `seed`; with
            a `prefix`, those of negative prompts.
        guided: Arguments that add guidance to negative prompts; None where the pipeline has none.
        inputs: Further arguments by a seed, such as pictures.
        sizes: Heights and widths in pixels; 2p divides all.
        size: Arguments of a call that say one of them.
        fewer: How many times fewer tokens 2p has.
        executor: Of a call that asks for no other way.
        schedulers: Schedulers beside the pipeline's own, by name.
        lora: Layers of the transformer that a LoRA changes, by the ends of their names; empty
            where the pipeline loads none.
        batch: Prompts that a call of the pipeline takes at most; others are left out.
        captured: Names of the buckets that a mixed plan captures; experts have their own.
        more: Further arguments of every call, which `guided` may replace.
    """

    pipeline: Callable[[], Any]
    prompts: Callable[..., dict[str, Any]]
    guided: Mapping[str, Any] | None = None
    inputs: Callable[[int], dict[str, Any]] = field(default=lambda _: {})
    sizes: tuple[tuple[int, int], ...] = ((64, 96), (128, 64))
    size: Callable[[int, int], dict[str, Any]] = field(
        default=lambda height, width: {"height": height, "width": width}
    )
    fewer: int = 4
    executor: str = "cpu"
    schedulers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    lora: tuple[str, ...] = ("to_out.0", "net.2")
    batch: int = 2
    captured: tuple[str, ...] = ("2p", "p")
    more: Mapping[str, Any] = field(default_factory=dict)

    def call(
        self,
        lengths: tuple[int, ...] = (7,),
        negative: tuple[int, ...] = (),
        seed: int = 1,
        **more: Any,
    ) -> dict[str, Any]:
        """Arguments of a call for latents, with guidance if there are negative prompts."""
        lengths, negative = lengths[: self.batch], negative[: self.batch]
        call = {
            **self.size(*self.sizes[0]),
            "num_inference_steps": STEPS,
            "output_type": "latent",
            **self.more,
            **self.inputs(seed),
            **self.prompts(lengths, seed=seed),
        }
        if negative:
            if self.guided is None:
                pytest.skip("the pipeline has no classifier-free guidance")
            call |= {**self.guided, **self.prompts(negative, seed=3, prefix="negative_")}
        return call | more

    def kinds(self, seed: int = 1) -> Iterator[dict[str, Any]]:
        """A call of every kind that the pipeline has."""
        for place, prompts in enumerate(KINDS.values()):
            if self.guided is not None or not prompts[1]:
                # Sizes by turns: every one sees several prompts, or guidance.
                yield self.call(*prompts, seed, **self.size(*self.sizes[place % 2]))


def eager(pipeline: Any, **options: Any) -> Engine:
    """An engine that runs the blocks uncompiled."""
    options = {"patch_sizes": "p,2p", "ranges": RANGES, **options}
    return ddit_rt.compile(pipeline, backend="eager", progress=False, **options)


def captured_by(graphs: Any, pipeline: Any, **options: Any) -> Engine:
    """The same, on the emulated CUDA device."""
    engine = eager(pipeline, **options)
    engine._loop.executor = CudaExecutor(graphs)
    return engine


def generated(engine: Engine, call: Mapping[str, Any], **more: Any) -> Tensor:
    """Latents of a call."""
    return latents_of(engine(**call, **more, generator=seeded()))


def trace_of(engine: Engine) -> Any:
    """Of the latest run."""
    assert engine.last_trace is not None
    return engine.last_trace


def in_half(pipeline: Any) -> Any:
    """The same in bfloat16, but for what its models keep in float32 when they are loaded."""
    pipeline.to(torch.bfloat16)
    for model in pipeline.components.values():
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
        for name, module in model.named_modules() if kept else ():
            if any(part in kept for part in name.split(".")):
                module.float()
    return pipeline


def assert_same_times(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Pipelines round the time to the latents' dtype, some before they divide it by 1000."""
    in_half(pipeline)
    engine, found = eager(pipeline), []
    call = {
        name: one.bfloat16() if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in {**call, "num_inference_steps": 12}.items()
    }
    fine = partial(engine, patch_policy=FINE)
    for run in (pipeline, fine, partial(fine, callback_on_step_end=keep)):
        with embedded_times(pipeline.transformer) as seen:
            run(**call, generator=seeded())
        found.append(seen)
    assert len(found[0]) >= 12
    assert found[0] == found[1]
    # On its way through t in [0, 1] a time may change by a bit of float32.
    ours, theirs = ({f"{time:.5g}" for time in seen} for seen in (found[2], found[0]))
    assert ours == theirs


@contextmanager
def embedded_times(transformer: nn.Module) -> Iterator[set[float]]:
    """What the time embedders of a model are given; seen by Python, as engines refuse hooks."""
    seen: set[float] = set()
    kinds = {type(module) for module in transformer.modules()}
    codes = {kind.forward.__code__ for kind in kinds if kind.__name__ in TIME_EMBEDDERS}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes:
            seen.update(frame.f_locals[frame.f_code.co_varnames[1]].float().flatten().tolist())

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)


KINDS = {"two": ((7, 4), ()), "guided": ((7,), (7,)), "two guided": ((4, 7), (3, 5))}
"""Lengths of prompts and negative prompts: one pass, two as one batch, two that cannot be one."""


class FamilySuite:
    """A subclass whose name begins with `Test` runs all of this on its `case`."""

    case: ClassVar[FamilyCase]

    @pytest.fixture
    def engine(self) -> Engine:
        """One for all runs that leave model and pipeline as they were: no state survives a run."""
        return engine_of(type(self))

    def guided_or_not(self, negative: tuple[int, ...]) -> dict[str, Any]:
        """A call of one prompt, with guidance where the pipeline has it."""
        return self.case.call((7,), negative if self.case.guided else ())

    def test_all_fine_equals_diffusers(self, engine: Engine) -> None:
        for call in self.case.kinds():
            assert_equal(*runs(engine.pipeline, engine, call), tolerance=TOLERANCE)
            assert trace_of(engine).executor == self.case.executor

    def test_the_pipelines_own_loop_equals_diffusers(self, engine: Engine) -> None:
        for call in self.case.kinds():
            ours, theirs = runs(engine.pipeline, engine, call, callback_on_step_end=keep)
            assert_equal(ours, theirs, tolerance=TOLERANCE)
            assert trace_of(engine).executor == "pipeline-cpu"

    def test_both_ways_agree_in_coarse_steps(self, engine: Engine) -> None:
        for negative in ((), (5,))[: 1 + bool(self.case.guided)]:
            call = self.case.call((7,), negative)
            table = generated(engine, call, patch_policy=MIXED)
            driven = generated(engine, call, patch_policy=MIXED, callback_on_step_end=keep)
            assert table.shape == driven.shape
            assert torch.isfinite(driven).all()
            # The pipeline joins velocities, the table tokens of the small picture; that is linear
            # only where guidance is.
            if not negative:
                assert_equal(driven, table, tolerance=TOLERANCE)

    @pytest.mark.filterwarnings("ignore:the step cache reused no step")
    def test_a_first_block_may_run_ahead_of_the_others(self, engine: Engine) -> None:
        call = self.guided_or_not((5,))
        for way in WAYS:
            fine = generated(engine, call, patch_policy=FINE, **way)
            cache = FirstBlockCache(0.0)
            ahead = generated(engine, call, patch_policy=FINE, step_cache=cache, **way)
            assert_equal(ahead, fine, tolerance=TOLERANCE)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
    def test_in_half_precision_the_model_sees_the_pipelines_times(self) -> None:
        assert_same_times(self.case.pipeline(), self.case.call())

    def test_the_models_own_scheduler_settings_are_kept(self) -> None:
        for make in self.case.schedulers.values():
            pipeline = self.case.pipeline()
            pipeline.scheduler = make()
            call = self.case.call()
            assert_equal(*runs(pipeline, eager(pipeline), call), tolerance=TOLERANCE)

    def test_a_lora_acts_and_goes_without_a_trace(self) -> None:
        pipeline = self.case.pipeline()
        engine, call = eager(pipeline), self.case.call()
        if not self.case.lora:
            with pytest.raises(UnsupportedModelError, match="loads none"):
                engine.load_lora(lora_of(pipeline.transformer, ("to_q",)))
            return
        before = generated(engine, call, patch_policy=FINE)
        engine.load_lora(lora_of(pipeline.transformer, self.case.lora))
        ours, theirs = runs(pipeline, engine, call)
        assert_equal(ours, theirs, tolerance=TOLERANCE)
        assert float((ours - before).abs().max()) > 1e-3
        engine.unload_loras()
        assert torch.equal(generated(engine, call, patch_policy=FINE), before)

    def test_coarse_steps_run_and_stand_in_the_trace(self, engine: Engine) -> None:
        call = self.guided_or_not((7,))
        fine = generated(engine, call, patch_policy=FINE)
        mixed = generated(engine, call, patch_policy=MIXED)
        trace = trace_of(engine)
        assert trace.patch_sizes() == ["p", "2p", "2p", "p"]
        tokens = [record.tokens for record in trace]
        assert tokens[0] == self.case.fewer * tokens[1]
        assert torch.isfinite(mixed).all()
        assert float((mixed - fine).abs().max()) > 1e-3
        call["num_inference_steps"] = 6  # the first four are fine
        generated(engine, call, patch_policy=DDiTPolicy(tau=1.0, fine_tail=1))
        assert "2p" in trace_of(engine).patch_sizes()

    def test_what_follows_the_loop_is_the_pipelines_own(self, engine: Engine) -> None:
        call = self.case.call(output_type="np")
        ours = engine(**call, generator=seeded(), patch_policy=FINE)
        theirs = engine.pipeline(**call, generator=seeded())
        assert type(ours) is type(theirs)
        np.testing.assert_allclose(made(ours), made(theirs), atol=1e-4)

    def test_denoise_takes_the_arguments_of_the_models_own_forward(self) -> None:
        """Without a pipeline, where the family is that of a bare transformer."""
        pipeline = self.case.pipeline()
        transformer = pipeline.transformer
        family = family_of(transformer, pipeline)
        bare = family_of(transformer) is family
        engine = eager(transformer if bare else pipeline)
        size = (3, 8, 12) if family.video else (1, 48) if family.audio else (16, 16)
        latents = noise(1, family.latent_channels(transformer), *size)
        prompt: dict[str, Tensor] = {}
        for name, like in family.example(transformer, 0, 1, 7).items():
            beside = family.extra_size(tuple(latents.shape)) if name in family.extra else ()
            shape = (*like.shape[: like.ndim - len(beside)], *beside)
            prompt[name] = (noise(*shape) if like.ndim > 2 else torch.ones(shape)).to(like.dtype)
        text = prompt[family.text]
        negative = {f"negative_{family.text}": text * 0.5, family.scale: torch.tensor(3.0)}
        denoise = partial(engine.denoise, latents, num_inference_steps=STEPS, patch_policy=MIXED)
        for more in ({}, negative):
            assert torch.isfinite(denoise(**prompt, **more)).all()
        with pytest.raises(ShapeError, match=f"`{family.text}` has shape.*text tokens"):
            denoise(**{**prompt, family.text: text[..., :5]})
        for name, value in prompt.items():
            with pytest.raises(ValueError, match=f"`{name}` is missing"):
                denoise(**{other: prompt[other] for other in prompt.keys() - {name}})
            with pytest.raises(TypeError, match=f"got .?{name}.*expected"):
                denoise(**{**prompt, name: value.int()})
            if name in family.extra:
                with pytest.raises(ShapeError, match=f"`{name}`.*its last dimensions are"):
                    denoise(**{**prompt, name: value[..., :4, :4]})

    @pytest.mark.slow
    def test_captured_runs_equal_the_cpus_to_the_bit(self, engine: Engine, graphs: Any) -> None:
        """What a run has captured serves the next one of its kind, and none of another kind."""
        device = captured_by(graphs, self.case.pipeline())
        calls = list(zip(self.case.kinds(), self.case.kinds(seed=8), strict=True))
        for call, other in calls:
            expected = generated(engine, call, patch_policy=MIXED)
            assert torch.equal(generated(device, call, patch_policy=MIXED), expected)
            others = generated(engine, other, patch_policy=OTHER)
            assert torch.equal(generated(device, other, patch_policy=OTHER), others)
            assert torch.equal(generated(device, call, patch_policy=MIXED), expected)
        assert trace_of(device).executor == "cuda-loop"
        assert sorted(graphs.captured) == sorted(self.case.captured * len(calls))

    @pytest.mark.slow
    def test_captured_runs_that_the_pipeline_drives_equal_the_cpus(
        self, engine: Engine, graphs: Any
    ) -> None:
        device, call = captured_by(graphs, self.case.pipeline()), self.guided_or_not((5,))
        more = {"patch_policy": MIXED, "callback_on_step_end": keep}
        assert torch.equal(generated(device, call, **more), generated(engine, call, **more))
        assert trace_of(device).executor == "pipeline-cuda"

    @pytest.mark.slow
    def test_a_step_cache_reuses_what_the_blocks_added(self, engine: Engine, graphs: Any) -> None:
        device, call = captured_by(graphs, self.case.pipeline()), self.guided_or_not((7,))
        fine = generated(engine, call, patch_policy=FINE)
        for cache in (CACHE, FirstBlockCache(1e30, max_consecutive_cached=1)):
            more = {"patch_policy": FINE, "step_cache": cache}
            ours = generated(engine, call, **more)
            assert any("reused" in record.cache_reason for record in trace_of(engine))
            assert torch.equal(generated(device, call, **more), ours)
            assert 1e-6 < float((fine - ours).abs().max() / fine.abs().max()) < 1

    @pytest.mark.slow
    def test_cost_and_memory_are_counted(self, engine: Engine) -> None:
        pipeline = engine.pipeline
        model = StepModel(
            family=family_of(pipeline.transformer, pipeline),
            transformer=pipeline.transformer,
            base={},
        )
        sizes = {"height": 16, "width": 16, "batch": 1, "text_tokens": 7}
        frames = {name: n for name, n in self.case.more.items() if name == "num_frames"}
        sizes |= {"frames": 3} if frames else {}
        fine, coarse = (step_cost(model, multiple=multiple, **sizes) for multiple in (1, 2))
        assert fine.flops > coarse.flops > 0
        assert fine.weight_bytes == coarse.weight_bytes
        size = {**self.case.size(*self.case.sizes[0]), **frames}
        memory = memory_of(engine.artifact, pipeline, STEPS, **size)
        assert [bucket.patch for bucket in memory.buckets] == ["p", "2p"]
        held = bool(family_of(pipeline.transformer, pipeline).held)
        assert all((bucket.positions_bytes > 0) is held for bucket in memory.buckets)

    @pytest.mark.slow
    def test_compiled_blocks_equal_diffusers(self, engine: Engine, packages: Packages) -> None:
        pipeline, uncompiled = engine.pipeline, engine
        # The family's own ranges, so that other tests of its commands find these packages.
        asked = {**self.case.more, **self.case.size(*self.case.sizes[0])}
        size = {name: asked[name] for name in ("height", "width", "num_frames") if name in asked}
        with packages():
            engine = ddit_rt.compile(pipeline, patch_sizes="p,2p", progress=False, **size)
        for call in self.case.kinds():
            assert_equal(*runs(pipeline, engine, call), tolerance=TOLERANCE)
        ours, expected = (
            generated(one, self.case.call(), patch_policy=MIXED) for one in (engine, uncompiled)
        )
        assert_equal(ours, expected, tolerance=1e-4)


class LoopSuite(FamilySuite):
    """What hangs on no family's file: of the loop and of the engine. For few families."""

    def test_nothing_of_the_pipeline_is_changed(self) -> None:
        pipeline = self.case.pipeline()
        engine = eager(pipeline)
        before = attributes_of(pipeline)
        generated(engine, self.case.call(), patch_policy=MIXED)
        generated(engine, self.case.call(), patch_policy=MIXED, callback_on_step_end=keep)
        after = attributes_of(pipeline)
        assert after["transformer"] == before["transformer"]
        # What the pipeline's own call leaves, and its scheduler.
        assert all(name.startswith("_") for name in after["pipeline"] - before["pipeline"])
        assert not {"step", "forward"} & after["scheduler"]

    def test_what_a_compiled_block_would_ignore_is_refused_by_name(self, engine: Engine) -> None:
        pipeline = engine.pipeline
        names = {"attention_kwargs", "joint_attention_kwargs"}
        for name in names & set(type(pipeline).__call__.__code__.co_varnames):
            with pytest.raises(UnsupportedModelError, match=f"`{name}`.*leave the argument out"):
                engine(**self.case.call(), **{name: {"scale": 0.5}})
        with pytest.raises(UnsupportedModelError, match="trained adapters"):
            eager(pipeline, adapter=ddit_rt.AdapterSet())

    @pytest.mark.slow
    def test_steps_outside_the_guidance_interval_run_the_prompt_alone(
        self, engine: Engine, graphs: Any
    ) -> None:
        call = self.case.call((7,), (7,))
        more = {"patch_policy": MIXED, "guidance_interval": (0.34, 0.67)}
        ours = generated(engine, call, **more)
        device = captured_by(graphs, self.case.pipeline())
        assert torch.equal(generated(device, call, **more), ours)
        whole = generated(engine, call, patch_policy=MIXED)
        assert float((whole - ours).abs().max()) > 1e-3

    @pytest.mark.slow
    def test_what_magcache_has_to_know_is_measured(self, engine: Engine) -> None:
        """With and without guidance, also of passes that cannot be one batch."""
        for call in (self.case.call(), self.guided_or_not((5,))):
            plan, latents = measuring_plan(engine, "magcache", **call, generator=seeded())
            ratios = watch(plan, latents).ratios
            assert len(ratios) == len(plan.stages) - 1
            assert len(set(ratios)) == len(ratios)
            assert all(0 < ratio < 100 for ratio in ratios)


@lru_cache(maxsize=1)
def engine_of(suite: type[FamilySuite]) -> Engine:
    """Of a suite's tiny model; kept until another suite's turn."""
    return eager(suite.case.pipeline())


def attributes_of(pipeline: Any) -> dict[str, set[str]]:
    """Names of what a pipeline and its parts have of their own."""
    parts = {name: getattr(pipeline, name) for name in ("transformer", "scheduler")}
    return {name: set(vars(part)) for name, part in {"pipeline": pipeline, **parts}.items()}


def lora_of(transformer: nn.Module, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """A LoRA of rank 4 for the transformer's layers whose names end so."""
    state: dict[str, Tensor] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(ends):
            for which, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                state[f"transformer.{name}.lora_{which}.weight"] = noise(*shape) * 0.3
    assert state
    return state
