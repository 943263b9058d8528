from __future__ import annotations

import warnings
from itertools import count

import numpy as np

import ddit_rt
from ddit_rt import DDiTPolicy, Engine, FinePolicy, SeaCache
from ddit_rt.lab.measure.timing import (
    Batch,
    Generation,
    Method,
    engine_method,
    loop_clock,
    measure,
    on_trial,
    pipeline_method,
)

BATCHES = [Batch(prompts=("a",), seeds=(0,)), Batch(prompts=("b",), seeds=(1,))]


class StubVae:
    def decode(self, value: int) -> int:
        return value


class StubPipeline:
    """The two methods that the clock watches."""

    def __init__(self) -> None:
        self.vae = StubVae()

    def prepare_latents(self) -> int:
        return 3


def test_methods_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    pipeline = StubPipeline()

    def method(name: str) -> Method:
        def generate(batch: Batch) -> Generation:
            calls.append(name + batch.prompts[0])
            image = np.zeros((1, 1, 3), dtype=np.uint8)
            return Generation(outputs=(image,), trace=None)

        return Method(name=name, label=name, generate=generate, pipeline=pipeline)

    steps: list[None] = []
    methods = [method("x"), method("y")]
    ticks = count()
    samples = measure(
        methods,
        BATCHES,
        repeats=2,
        advance=lambda: steps.append(None),
        clock=lambda: float(next(ticks)),
    )
    assert calls == ["xa", "ya", *["xa", "ya", "xb", "yb"] * 2]
    assert len(steps) == len(calls)
    assert [sample.batch for sample in samples["y"]] == BATCHES
    # The clock is read twice around every measured call, and by nothing else.
    assert all(sample.end_to_end == (1.0, 1.0) for sample in samples["x"])
    assert samples["x"][0].median_end_to_end == 1.0
    calls.clear()
    measure(methods, BATCHES, repeats=1, warm_up=False)
    assert calls == ["xa", "ya", "xb", "yb"]


def test_clock_times_from_latents_to_decoding_and_leaves_no_trace() -> None:
    pipeline = StubPipeline()
    readings = iter([10.0, 12.5])
    with loop_clock(pipeline, lambda: next(readings)) as loop:
        assert pipeline.prepare_latents() == 3
        assert pipeline.vae.decode(5) == 5
    assert loop.seconds == 2.5
    assert "prepare_latents" not in vars(pipeline)
    assert "decode" not in vars(pipeline.vae)


def test_engine_and_pipeline_draw_the_same_noise_at_any_batch(engine: Engine) -> None:
    arguments = {"num_inference_steps": 2, "height": 32, "width": 32}
    both = Batch(prompts=("a", "b"), seeds=(5, 6))
    second = Batch(prompts=("b",), seeds=(6,))
    reference = pipeline_method("d", "d", engine.pipeline, **arguments).generate(both)
    fine = engine_method("e", "e", engine, patch_policy=FinePolicy(), **arguments)
    ours = fine.generate(second)
    assert ours.trace is not None
    difference = reference.outputs[1].astype(int) - ours.outputs[0].astype(int)
    # One level: the two sum in another order, and a byte may round the other way.
    assert np.abs(difference).max() <= 1


def test_a_plan_on_trial_that_does_nothing_stands_in_its_trace_alone(engine: Engine) -> None:
    small = {"patch_sizes": "p,2p", "backend": "eager", "progress": False}
    fresh = ddit_rt.compile(engine.pipeline, **small)
    plan = {"patch_policy": DDiTPolicy(1e-9), "step_cache": SeaCache(1e-9)}
    arguments = {"num_inference_steps": 8, "height": 32, "width": 32, **plan}
    method = engine_method("e", "e", fresh, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = on_trial(method).generate(BATCHES[0]).trace
    assert trace is not None
    assert [note.partition(":")[0] for note in trace.notes[-2:]] == [
        "the policy took no coarse step",
        "the step cache reused no step",
    ]
