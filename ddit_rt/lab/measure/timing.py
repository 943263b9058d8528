"""Fair timing of several ways to generate the same images or videos.

The denoising loop is timed from the return of `pipeline.prepare_latents` to the call of
`pipeline.vae.decode`. diffusers' own call and `ddit_rt.Engine` both go through these two methods
of the same pipeline, so both pay for everything in between: timesteps, set-up of the run, model,
scheduler and progress bar. End-to-end time is the whole call, which includes encoding prompts,
decoding and conversion to images.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ddit_rt.lab.measure.sound_file import as_pcm
from ddit_rt.loop import IDLE_CACHE, IDLE_POLICY, RunTrace

Pixels = npt.NDArray[np.integer[Any]]
"""An image, `[H, W, 3]`, or a video, `[F, H, W, 3]`, in bytes of RGB; or a recording in 16 bits,
`[channels, samples]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Prompts that are generated in one call, each with the seed of its noise."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What one call gave: an image or video per prompt, and the trace if an engine made them."""

    outputs: tuple[Pixels, ...]
    trace: RunTrace | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to generate.

    Attributes:
        name: Identifier in reports.
        label: Name for people.
        generate: Generates a batch.
        pipeline: The pipeline that `generate` goes through, which is what gets timed.
    """

    name: str
    label: str
    generate: Callable[[Batch], Generation]
    pipeline: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Repeated measurements of one method on one batch.

    Attributes:
        batch: What was generated.
        outputs: Images or videos of the latest repeat; every repeat starts from the same noise.
        trace: Trace of the latest repeat.
        denoise: Seconds of the denoising loop, per repeat.
        end_to_end: Seconds of the whole call, per repeat.
    """

    batch: Batch
    outputs: tuple[Pixels, ...]
    trace: RunTrace | None
    denoise: tuple[float, ...]
    end_to_end: tuple[float, ...]

    @property
    def median_denoise(self) -> float:
        """Median seconds of the denoising loop."""
        return statistics.median(self.denoise)

    @property
    def median_end_to_end(self) -> float:
        """Median seconds of the whole call."""
        return statistics.median(self.end_to_end)


class _Loop:
    """Seconds of the latest denoising loop."""

    seconds = 0.0


@contextmanager
def loop_clock(pipeline: Any, clock: Callable[[], float] = time.perf_counter) -> Iterator[_Loop]:
    """Times the denoising loops of a pipeline; the module docstring says from where to where."""
    prepare, decode = pipeline.prepare_latents, pipeline.vae.decode
    loop, started = _Loop(), 0.0

    def timed_prepare(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        result = prepare(*args, **kwargs)
        started = clock()
        return result

    def timed_decode(*args: Any, **kwargs: Any) -> Any:
        loop.seconds = clock() - started
        return decode(*args, **kwargs)

    pipeline.prepare_latents, pipeline.vae.decode = timed_prepare, timed_decode
    try:
        yield loop
    finally:
        # The wrappers shadow the methods of the classes: without them the methods are back.
        del pipeline.prepare_latents, pipeline.vae.decode


def measure(
    methods: Sequence[Method],
    batches: Sequence[Batch],
    *,
    repeats: int,
    advance: Callable[[], object] = lambda: None,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Generates every batch with every method, interleaved, after a warm-up.

    Methods take turns on each batch, and rounds repeat, so that a machine that slows down or
    speeds up meanwhile does so for all of them alike.

    Args:
        methods: Ways to generate.
        batches: What to generate.
        repeats: Measured rounds.
        advance: Called after every call, warm-up included: `len(methods)` x
            (1 + `repeats` x `len(batches)`) times.
        warm_up: Whether every method runs once unmeasured; that is not needed where all of them
            have just run.
        clock: Gives seconds. On a CPU with one thread, `time.process_time` leaves out what other
            work on the machine took from it.

    Returns:
        One sample per batch, by the name of the method.
    """
    for method in methods if warm_up else ():
        method.generate(batches[0])
        advance()
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    results: dict[tuple[str, int], Generation] = {}
    for _ in range(repeats):
        for index, batch in enumerate(batches):
            for method in methods:
                key = method.name, index
                results[key], seconds = _timed(method, batch, clock)
                times.setdefault(key, []).append(seconds)
                advance()
    return {
        method.name: [
            _sample(batch, results[method.name, index], times[method.name, index])
            for index, batch in enumerate(batches)
        ]
        for method in methods
    }


def _timed(
    method: Method, batch: Batch, clock: Callable[[], float]
) -> tuple[Generation, tuple[float, float]]:
    with loop_clock(method.pipeline, clock) as loop:
        started = clock()
        generation = method.generate(batch)
        total = clock() - started
    return generation, (loop.seconds, total)


def _sample(batch: Batch, result: Generation, times: list[tuple[float, float]]) -> Sample:
    denoise, end_to_end = zip(*times, strict=True)
    return Sample(
        batch=batch,
        outputs=result.outputs,
        trace=result.trace,
        denoise=denoise,
        end_to_end=end_to_end,
    )


def pipeline_method(name: str, label: str, pipeline: Any, **arguments: Any) -> Method:
    """The pipeline's own call, as diffusers wrote it."""

    def generate(batch: Batch) -> Generation:
        output = pipeline(list(batch.prompts), generator=generators(batch), **arguments)
        return Generation(outputs=_pixels(output), trace=None)

    return Method(name=name, label=label, generate=generate, pipeline=pipeline)


def engine_method(name: str, label: str, engine: Any, **arguments: Any) -> Method:
    """A compiled engine; `arguments` hold its `patch_policy`."""

    def generate(batch: Batch) -> Generation:
        output = engine(list(batch.prompts), generator=generators(batch), **arguments)
        return Generation(outputs=_pixels(output), trace=engine.last_trace)

    return Method(name=name, label=label, generate=generate, pipeline=engine.pipeline)


def on_trial(method: Method) -> Method:
    """The same without a word where the plan does nothing: nobody but a search asked for it."""

    def generate(batch: Batch) -> Generation:
        with warnings.catch_warnings():
            for idle in (IDLE_POLICY, IDLE_CACHE):
                warnings.filterwarnings("ignore", idle, UserWarning)
            return method.generate(batch)

    return replace(method, generate=generate)


def generators(batch: Batch) -> list[Any]:
    """One generator per prompt, so that its noise does not depend on the batch it is in."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in batch.seeds]


def _pixels(output: Any) -> tuple[Pixels, ...]:
    if hasattr(output, "audios"):  # `[B, channels, samples]` in [-1, 1]
        return tuple(map(as_pcm, output.audios))
    if hasattr(output, "frames"):  # `[B, F, H, W, 3]` in [0, 1]
        return tuple(np.rint(np.asarray(video) * 255).astype(np.uint8) for video in output.frames)
    return tuple(np.asarray(image.convert("RGB"), dtype=np.uint8) for image in output.images)
