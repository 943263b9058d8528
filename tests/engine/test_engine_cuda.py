"""Whole runs on a CUDA device: against the CPU, without syncs, and the forms among each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from driving import CALLBACKS, assert_equal, runs, trace_of
from models import (
    eager,
    noise,
    random_adapters,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
)
from torch import Tensor

import ddit_rt
from ddit_rt import DDiTPolicy, FinePolicy, NoCache, StaticPolicy, StepCache, TeaCache
from ddit_rt.errors import ArtifactMismatchError, RunCancelled
from ddit_rt.loop import RunTrace

pytestmark = pytest.mark.gpu

SIZES = StaticPolicy(["p", "2p", "4p", "2p", "p", "p"])
DYNAMIC = DDiTPolicy(tau=0.3, refresh=2)
EVERY = [FinePolicy(), SIZES, DYNAMIC, replace(SIZES, fine_share=0.25)]
FORMS = ["loop", "step", "host"]
SHAPE = (2, 4, 16, 16)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("DDIT_RT_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_pipeline().to("cuda")


@pytest.fixture(scope="module")
def engine(pipeline: FluxPipeline) -> ddit_rt.Engine:
    return ddit_rt.compile(pipeline, height=64, width=64, progress=False)


def conditioning(pipeline: FluxPipeline, seed: int = 1) -> dict[str, Tensor]:
    given = tiny_conditioning(pipeline.transformer, batch=SHAPE[0], seed=seed)
    return {name: tensor.cuda() for name, tensor in given.items()}


def denoise(
    engine: ddit_rt.Engine, policy: Any, *, seed: int = 1, steps: int = 6, **arguments: Any
) -> Tensor:
    latents = noise(*SHAPE, seed=seed).cuda()
    given = conditioning(engine.pipeline, seed)
    return engine.denoise(
        latents, num_inference_steps=steps, patch_policy=policy, **given, **arguments
    )


def on_the_cpu(**options: Any) -> tuple[Tensor, RunTrace]:
    """The run that `denoise` does by default, and its trace."""
    cpu = eager(tiny_pipeline())
    given = tiny_conditioning(cpu.pipeline.transformer, batch=SHAPE[0], seed=1)
    final = cpu.denoise(noise(*SHAPE, seed=1), num_inference_steps=6, **options, **given)
    return final, trace_of(cpu)


@pytest.mark.parametrize("policy", EVERY, ids=["fine", "sizes", "ddit", "mixed"])
def test_forms_agree_to_the_bit_and_with_the_cpu(engine: ddit_rt.Engine, policy: Any) -> None:
    results, traces = [], []
    for form in FORMS:
        engine.executor = form
        results.append(denoise(engine, policy))
        traces.append(engine.last_trace)
    engine.executor = "auto"
    assert [trace.executor for trace in traces] == [f"cuda-{form}" for form in FORMS]
    for result, trace in zip(results[1:], traces[1:], strict=True):
        assert torch.equal(result, results[0])
        assert [r.scores for r in trace] == pytest.approx([r.scores for r in traces[0]])
    expected, trace = on_the_cpu(patch_policy=policy)
    assert traces[0].patch_sizes() == trace.patch_sizes()
    # float32 on both; matrix products sum in another order (and may use TF32 nowhere by default).
    torch.testing.assert_close(results[0].cpu(), expected, rtol=2e-3, atol=2e-3)


CACHE = TeaCache(0.4, coefficients=(1.0, 0.0))
PAIRS = StaticPolicy(["p", "p", "2p", "2p", "2p", "p"])


@pytest.mark.parametrize("policy", [FinePolicy(), PAIRS], ids=["fine", "pairs"])
def test_reused_steps_agree_in_all_forms_and_with_the_cpu(
    engine: ddit_rt.Engine, policy: Any
) -> None:
    results, patterns = [], []
    for form in (*FORMS, *FORMS):
        engine.executor = form
        results.append(denoise(engine, policy, step_cache=CACHE))
        patterns.append([record.cache_reason for record in engine.last_trace])
        denoise(engine, SIZES, seed=2)  # and nothing of it, or of a run between, is left
    engine.executor = "auto"
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(pattern == patterns[0] for pattern in patterns)
    assert "reused: below threshold" in patterns[0]
    expected, trace = on_the_cpu(patch_policy=policy, step_cache=CACHE)
    assert patterns[0] == [record.cache_reason for record in trace]
    # As above.
    torch.testing.assert_close(results[0].cpu(), expected, rtol=2e-3, atol=2e-3)


def test_all_fine_equals_diffusers(engine: ddit_rt.Engine, pipeline: FluxPipeline) -> None:
    call = {"height": 64, "width": 64, "num_inference_steps": 8, "output_type": "latent"}
    arguments = {**{k: v.cuda() for k, v in tiny_embeds(1).items()}, **call}
    expected = pipeline(**arguments, generator=seeded(3)).images
    actual = engine(**arguments, generator=seeded(3), patch_policy=FinePolicy()).images
    # The blocks are compiled, so rounding differs; 8 steps of values of order 1.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", [NoCache(), CACHE], ids=["plain", "cached"])
@pytest.mark.parametrize("form", ["loop", "step"])
def test_a_whole_image_never_synchronises(
    engine: ddit_rt.Engine, form: str, cache: StepCache
) -> None:
    engine.executor = form
    options = {"num_inference_steps": 6, "patch_policy": DYNAMIC, "step_cache": cache}
    denoise(engine, DYNAMIC, step_cache=cache)  # captures
    latents, given = noise(*SHAPE).cuda(), conditioning(engine.pipeline)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.denoise(latents, **options, **given)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        engine.executor = "auto"


def runtime_calls(engine: ddit_rt.Engine, steps: int) -> list[str]:
    """CUDA runtime calls between the first and the last launch of a run, by CUPTI."""
    latents, given = noise(*SHAPE).cuda(), conditioning(engine.pipeline)
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        engine.annotate = True
        engine.denoise(latents, num_inference_steps=steps, patch_policy=DYNAMIC, **given)
        engine.annotate = False
    events = profile.events()
    (run,) = (event for event in events if event.name == "ddit_rt/run" and event.cpu_children)
    inside = [
        event.name
        for event in events
        if event.name.startswith("cuda")
        and run.time_range.start <= event.time_range.start <= run.time_range.end
    ]
    return [name for name in inside if not name.startswith("cudaEvent")]


@pytest.mark.parametrize(("form", "launches"), [("loop", 1), ("step", 6)])
def test_one_launch_per_image_or_per_step(engine: ddit_rt.Engine, form: str, launches: int) -> None:
    engine.executor = form
    denoise(engine, DYNAMIC)
    calls = runtime_calls(engine, 6)
    engine.executor = "auto"
    assert calls.count("cudaGraphLaunch") == launches
    assert not [name for name in calls if "Synchronize" in name or "Memcpy" in name]


@pytest.mark.parametrize("policy", EVERY, ids=["fine", "sizes", "ddit", "mixed"])
def test_latents_that_are_not_finite_are_announced(engine: ddit_rt.Engine, policy: Any) -> None:
    given = conditioning(engine.pipeline)
    given["encoder_hidden_states"][0, 0, 0] = float("nan")
    options = {"num_inference_steps": 6, "patch_policy": policy}
    with pytest.warns(UserWarning, match="became NaN or infinite during the run"):
        engine.denoise(noise(*SHAPE).cuda(), **options, **given)
    assert engine.last_trace is not None
    assert engine.last_trace.nonfinite
    denoise(engine, policy)
    assert not engine.last_trace.nonfinite


def test_shapes_are_captured_once(engine: ddit_rt.Engine) -> None:
    before = len(engine.captures)
    for _ in range(2):
        engine.denoise(
            noise(1, 4, 24, 8).cuda(),
            num_inference_steps=4,
            patch_policy=FinePolicy(),
            **{n: t[:1] for n, t in conditioning(engine.pipeline).items()},
        )
    assert len(engine.captures) == before + 1
    report = engine.captures[-1]
    assert report.buckets == ("p",)
    assert report.nodes["p"] > 10
    assert report.capture_ms > 0


def test_bfloat16_and_adapters(home: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline().to(torch.bfloat16)
    adapters = random_adapters(pipeline)
    pipeline.to("cuda")
    adapters = type(adapters)(
        adapters={
            multiple: adapter.to("cuda", torch.bfloat16)
            for multiple, adapter in adapters.adapters.items()
        }
    )
    for adapter in adapters.adapters.values():
        adapter.lora = {k: v.to("cuda", torch.bfloat16) for k, v in adapter.lora.items()}
    engine = ddit_rt.compile(pipeline, adapter=adapters, progress=False)
    path = engine.save(tmp_path / "adapters.ddit")
    loaded = ddit_rt.load(path, pipeline, progress=False)
    given = {n: t.bfloat16() for n, t in conditioning(pipeline).items()}
    latents = noise(*SHAPE).cuda()
    results = [
        runner.denoise(latents, num_inference_steps=6, patch_policy=SIZES, **given)
        for runner in (engine, loaded)
    ]
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()


def test_a_fused_lora_acts_without_another_capture(engine: ddit_rt.Engine) -> None:
    """In place, so that the captured graphs read the new weights."""
    before, captures = denoise(engine, SIZES), len(engine.captures)
    weight = engine.pipeline.transformer.transformer_blocks[0].ff.net[2].weight
    saved = weight.clone()
    weight.mul_(1.5)
    assert not torch.equal(denoise(engine, SIZES), before)
    weight.copy_(saved)
    assert torch.equal(denoise(engine, SIZES), before)
    assert len(engine.captures) == captures


@pytest.mark.parametrize("policy", EVERY, ids=["fine", "sizes", "ddit", "mixed"])
def test_a_scheduler_that_takes_its_steps_agrees_with_the_table(
    engine: ddit_rt.Engine, policy: Any
) -> None:
    steps: list[int] = []

    def callback(step: int, latents: Tensor) -> None:
        steps.append(step)

    table = denoise(engine, policy)
    sizes, captures = engine.last_trace.patch_sizes(), len(engine.captures)
    final = denoise(engine, policy, callback=callback)
    assert steps == list(range(6))
    assert engine.last_trace.executor == "scheduler-cuda"
    assert "callback" in engine.last_trace.notes[-1]
    assert engine.last_trace.patch_sizes() == sizes
    assert len(engine.captures) == captures
    torch.testing.assert_close(final, table, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", range(len(CALLBACKS)), ids=CALLBACKS)
def test_the_pipelines_own_loop_does_what_it_does_in_diffusers(
    engine: ddit_rt.Engine, place: int
) -> None:
    """With guidance and without by turns."""
    callback, guided = list(CALLBACKS.values())[place], place % 2 == 1
    embeds = tiny_embeds()
    if guided:
        embeds |= {f"negative_{name}": tensor for name, tensor in tiny_embeds(seed=9).items()}
    call: dict[str, Any] = {name: tensor.cuda() for name, tensor in embeds.items()}
    call |= {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}
    call |= {"true_cfg_scale": 3.0 if guided else 1.0}
    call |= {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"], **callback}
    assert_equal(*runs(engine.pipeline, engine, call), tolerance=2e-3)
    assert engine.last_trace.executor == "pipeline-cuda"


def test_cancel_from_another_thread(engine: ddit_rt.Engine) -> None:
    done = threading.Event()

    def keep_cancelling() -> None:
        while not done.is_set():
            engine.cancel()

    def keep_running() -> None:
        for _ in range(200):
            denoise(engine, FinePolicy(), steps=60)

    thread = threading.Thread(target=keep_cancelling)
    thread.start()
    try:
        with pytest.raises(RunCancelled):
            keep_running()
    finally:
        done.set()
        thread.join()
    reference = denoise(engine, SIZES)
    assert torch.equal(denoise(engine, SIZES), reference)


def test_two_engines_in_two_threads(pipeline: FluxPipeline) -> None:
    engines = [eager(pipeline) for _ in range(2)]
    expected = [denoise(engine, SIZES, seed=seed) for seed, engine in enumerate(engines)]
    results: dict[int, Tensor] = {}

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = denoise(engines[index], SIZES, seed=index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(2))


def test_a_moved_model_is_refused(home: Path) -> None:
    pipeline = tiny_pipeline().to("cuda")
    engine = eager(pipeline)
    pipeline.to("cpu")
    with pytest.raises(ArtifactMismatchError, match="was on cuda:0.*is on cpu"):
        denoise(engine, FinePolicy())


def test_switching_needs_no_warning(engine: ddit_rt.Engine) -> None:
    """On a driver that can switch, nothing falls back."""
    engine.executor = "auto"
    denoise(engine, DYNAMIC)
    assert engine.last_trace.executor == "cuda-loop"
