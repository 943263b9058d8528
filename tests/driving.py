"""Callbacks of all kinds, and runs of the engine beside diffusers' own: for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from models import seeded
from torch import Tensor

from ddit_rt import Engine, FinePolicy
from ddit_rt.loop import RunTrace

FINE = FinePolicy()
Callback = Callable[[Any, int, Any, dict[str, Any]], Any]


def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Changes nothing."""
    del step, timestep
    return tensors


def halve_in_place(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """In two steps in a row, and in the last of six."""
    del timestep
    if step in (1, 2, 5):
        tensors["latents"].mul_(0.5)
    return tensors


def replace_latents(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same with latents of its own, and nothing returned in between."""
    del timestep
    return {"latents": tensors["latents"].roll(1, 1) * 0.7} if step in (1, 2, 5) else {}


def clear_prompt_in_place(
    _: Any, step: int, timestep: Any, tensors: dict[str, Any]
) -> dict[str, Any]:
    """Asks for the prompt alone."""
    del timestep
    if step == 2:
        tensors["prompt_embeds"].zero_()
    return tensors


def replace_prompt(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """In two steps; what changed before stays changed."""
    del timestep
    return {"prompt_embeds": tensors["prompt_embeds"].flip(1) + 1} if step in (1, 3) else {}


def interrupt(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Ends the run with latents of its own."""
    del timestep
    if step == 2:
        pipeline._interrupt = True
        tensors["latents"] = tensors["latents"] * 2
    return tensors


class CutOff(PipelineCallback):  # type: ignore[misc]
    """As diffusers' `SDXLCFGCutoffCallback`, for flow pipelines."""

    tensor_inputs = ["prompt_embeds"]  # noqa: RUF012 - as diffusers' own

    def callback_fn(
        self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        del timestep
        if step == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors


class Fade(PipelineCallback):  # type: ignore[misc]
    """Asks for latents and prompt."""

    tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012 - as diffusers' own

    def callback_fn(
        self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        del pipeline, timestep
        if step >= self.config.cutoff_step_index:
            tensors["latents"].mul_(0.9)
            tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.5
        return tensors


def both_objects() -> Any:
    """Two callback objects, one after the other."""
    return MultiPipelineCallbacks(
        [CutOff(cutoff_step_ratio=0.5), Fade(cutoff_step_ratio=None, cutoff_step_index=1)]
    )


CALLBACKS: dict[str, dict[str, Any]] = {
    "keep": {"callback_on_step_end": keep},
    "in-place latents": {"callback_on_step_end": halve_in_place},
    "other latents": {"callback_on_step_end": replace_latents},
    "in-place prompt": {
        "callback_on_step_end": clear_prompt_in_place,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
    "other prompt": {
        "callback_on_step_end": replace_prompt,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
    "interrupt": {"callback_on_step_end": interrupt},
    "object": {
        "callback_on_step_end": Fade(cutoff_step_ratio=None, cutoff_step_index=2),
    },
    "cut-off object": {"callback_on_step_end": CutOff(cutoff_step_ratio=0.4)},
    "two objects": {"callback_on_step_end": both_objects()},
}
"""Arguments of a call, by what the callback does. All work for any pipeline."""


def made(result: Any) -> Any:
    """Pictures, videos or audio."""
    (name,) = {"images", "frames", "audios"} & set(dir(result))
    return getattr(result, name)


def latents_of(result: Any) -> Tensor:
    """Of a picture, a video or audio that was asked for as latents."""
    latents = made(result)
    assert isinstance(latents, Tensor)
    return latents


def runs(
    pipeline: Any, engine: Engine, call: Mapping[str, Any], **more: Any
) -> tuple[Tensor, Tensor]:
    """Latents of the engine and of the pipeline, from the same noise."""
    # Clones: a callback may write into tensors that were passed.
    ours, theirs = (
        {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in call.items()
        }
        for _ in range(2)
    )
    actual = latents_of(engine(**ours, generator=seeded(), **{"patch_policy": FINE, **more}))
    more.pop("patch_policy", None)
    return actual, latents_of(pipeline(**theirs, generator=seeded(), **more))


def trace_of(engine: Engine) -> RunTrace:
    """Of the latest run."""
    assert engine.last_trace is not None
    return engine.last_trace


def pattern(trace: RunTrace) -> str:
    """`c` and `r` per step: computed or reused."""
    return "".join("r" if record.reused else "c" for record in trace)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    error = (actual - expected).float().abs().max() / expected.float().abs().max()
    return float(error)


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Equal but for rounding in float32, with dtype and shape."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    assert relative_error(actual, expected) <= tolerance
