"""Ways to generate the same images: diffusers, what diffusers offers for speed, and ddit_rt.

Each method that changes the transformer works on its own copy of it; text encoders and VAE are
shared, so nothing else differs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from ddit_rt.engine import Engine
from ddit_rt.lab.demo.plans import demo_plans
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.timing import (
    Batch,
    Generation,
    Method,
    Sample,
    engine_method,
    measure,
    pipeline_method,
)
from ddit_rt.policies import FinePolicy, FirstBlockCache

CACHE_THRESHOLDS = (0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4, 0.6)
CACHE_DEFAULT = 0.05
PROBE_BATCHES = 2
"""Batches that settings are chosen on, before anything is reported."""


def with_own_transformer(pipeline: Any) -> Any:
    """The same pipeline around a copy of its transformer.

    Built anew: a deep copy would take along the hook registry that a run leaves behind, and that
    does not see hooks which are added later.
    """
    original = pipeline.transformer
    transformer = type(original).from_config(original.config).eval()
    transformer.load_state_dict(original.state_dict())
    copied = type(pipeline)(**{**pipeline.components, "transformer": transformer})
    copied.set_progress_bar_config(disable=True)
    return copied


def compiled_pipeline(pipeline: Any) -> Any:
    """Regional torch.compile with static shapes, its fastest way to run on a CPU.

    `max-autotune` is left out: on CPUs it tunes for minutes and its templates lost to MKL.
    """
    copied = with_own_transformer(pipeline)
    copied.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return copied


def openvino_pipeline(pipeline: Any) -> Any:
    """The transformer in OpenVINO, compiled for the shapes of each first call, in float32.

    With weights folded into its own layout, which forbids changing them: its fastest form.
    """
    import openvino

    copied = with_own_transformer(pipeline)
    transformer = copied.transformer.requires_grad_(False)
    compiled: dict[Any, Any] = {}

    def forward(**given: Any) -> tuple[torch.Tensor]:
        assert not given.pop("return_dict")
        tensors = {name: one for name, one in given.items() if isinstance(one, torch.Tensor)}
        others = {name: one for name, one in given.items() if name not in tensors}
        shapes = tuple((name, tuple(one.shape)) for name, one in tensors.items())
        if shapes not in compiled:
            model = openvino.convert_model(
                _Flat(transformer, tuple(tensors), others), example_input=tuple(tensors.values())
            )
            model.reshape(dict(enumerate(list(one.shape) for one in tensors.values())))
            settings = {
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            }
            compiled[shapes] = openvino.compile_model(model, "CPU", settings)
        outputs = compiled[shapes]([one.numpy() for one in tensors.values()])
        return (torch.from_numpy(outputs[0]),)

    transformer.forward = forward
    return copied


class _Flat(torch.nn.Module):
    """A transformer's forward that takes its tensors by position, as tracing wants them."""

    def __init__(self, transformer: Any, names: tuple[str, ...], others: Mapping[str, Any]) -> None:
        super().__init__()
        self.transformer, self._names, self._others = transformer, names, others

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self._names, tensors, strict=True))
        own = type(self.transformer).forward  # that of the object is OpenVINO's
        velocity: torch.Tensor
        (velocity,) = own(self.transformer, **named, **self._others, return_dict=False)
        return velocity


def all_methods(
    engine: Engine, batches: Sequence[Batch], arguments: Mapping[str, Any]
) -> list[Method]:
    """Everything that the benchmark compares.

    Args:
        engine: The loaded artifact.
        batches: What will be generated; the first of them serve to choose settings.
        arguments: Arguments of the pipeline's call.
    """
    pipeline, probe = engine.pipeline, batches[:PROBE_BATCHES]
    ours = engine_methods(engine, arguments)
    probed = measure(ours, probe, repeats=2)
    threshold = best_threshold(pipeline, probe, arguments, probed)
    steps = equal_time_steps(probed, arguments["num_inference_steps"])
    return [
        pipeline_method("diffusers", "diffusers, eager", pipeline, **arguments),
        pipeline_method(
            "torch_compile",
            "diffusers + torch.compile (regional)",
            compiled_pipeline(pipeline),
            **arguments,
        ),
        *openvino_methods(pipeline, arguments),
        _cached("first_block_cache", "default", pipeline, CACHE_DEFAULT, arguments),
        _cached("first_block_cache_best", "best", pipeline, threshold, arguments),
        *ours,
        engine_method(
            "fine_cached",
            f"ddit_rt, FirstBlockCache ({threshold:g})",
            engine,
            patch_policy=FinePolicy(),
            step_cache=FirstBlockCache(threshold),
            **arguments,
        ),
        engine_method(
            "fewer_steps",
            f"ddit_rt, {steps} steps at full resolution (time of dynamic)",
            engine,
            patch_policy=FinePolicy(),
            **{**arguments, "num_inference_steps": steps},
        ),
    ]


def engine_methods(engine: Engine, arguments: Mapping[str, Any], word: str = "") -> list[Method]:
    """The plans of the demo; `word` is put before their names and labels."""
    return [
        engine_method(
            f"{word}{plan.name}",
            f"ddit_rt, {word}{plan.label}",
            engine,
            patch_policy=plan.policy,
            **arguments,
        )
        for plan in demo_plans(arguments["num_inference_steps"])
    ]


def quantised_methods(
    engine: Engine, quantised: Engine, arguments: Mapping[str, Any]
) -> list[Method]:
    """The plans of the plain and of the quantised model, and diffusers with each."""
    entry = quantised.artifact.manifest.quantization
    assert entry is not None, "it was compiled so"
    kind = entry.kind
    return [
        pipeline_method("diffusers", "diffusers, eager", engine.pipeline, **arguments),
        pipeline_method(
            f"{kind} diffusers", f"diffusers, eager, {kind}", quantised.pipeline, **arguments
        ),
        *engine_methods(engine, arguments),
        *engine_methods(quantised, arguments, f"{kind} "),
    ]


def openvino_methods(pipeline: Any, arguments: Mapping[str, Any]) -> list[Method]:
    """None where it is not installed, which is said aloud."""
    if find_spec("openvino") is None:
        print("no row of OpenVINO: pip install 'ddit_rt[bench]' brings it", file=sys.stderr)
        return []
    label = "diffusers + OpenVINO (transformer)"
    return [pipeline_method("openvino", label, openvino_pipeline(pipeline), **arguments)]


def _cached(
    name: str, kind: str, pipeline: Any, threshold: float, arguments: Mapping[str, Any]
) -> Method:
    """The FirstBlockCache of diffusers. Its hooks decide with `.item()`, so it runs uncompiled."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    copied = with_own_transformer(pipeline)
    apply_first_block_cache(copied.transformer, FirstBlockCacheConfig(threshold=threshold))
    label = f"diffusers + FirstBlockCache ({kind}, {threshold:g})"
    return pipeline_method(name, label, copied, **arguments)


def best_threshold(
    pipeline: Any,
    probe: Sequence[Batch],
    arguments: Mapping[str, Any],
    ours: Mapping[str, Sequence[Sample]],
) -> float:
    """The largest threshold, so the fastest cache, that is at least as faithful as our dynamic run.

    The smallest threshold where none is.
    """
    fine = all_images(ours["fine"])
    wanted = fidelity(all_images(ours["dynamic"]), fine).mean_ssim
    best = CACHE_THRESHOLDS[0]
    for threshold in CACHE_THRESHOLDS:
        method = _cached("cache", "probe", pipeline, threshold, arguments)
        images = all_images([method.generate(batch) for batch in probe])
        if fidelity(images, fine).mean_ssim >= wanted:
            best = threshold
    return best


def equal_time_steps(ours: Mapping[str, Sequence[Sample]], steps: int) -> int:
    """Fine steps that take as long as the dynamic run."""
    dynamic, fine = (
        sum(sample.median_denoise for sample in ours[name]) for name in ("dynamic", "fine")
    )
    return max(1, min(steps, round(steps * dynamic / fine)))


def all_images(made: Sequence[Sample | Generation]) -> list[Any]:
    """The images of all batches, in order."""
    return [image for one in made for image in one.outputs]
