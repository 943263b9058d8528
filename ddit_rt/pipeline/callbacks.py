"""What runs beside the steps: the user's callback in diffusers' form, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddit_rt.buckets import ReplacedBucket, ReplacedSignal
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.executor import ProgressCallback, RunPlan, StepCallback
from ddit_rt.pipeline.prompt import RunPrompt
from ddit_rt.solver import Replacement
from ddit_rt.torch_state import callers_modes

_EMBEDS = {
    "prompt_embeds": "encoder_hidden_states",
    "negative_prompt_embeds": "negative_encoder_hidden_states",
}
"""Conditioning that a callback sees and may change, by the names that pipelines have for it."""


def pipeline_callback(
    pipeline: Any, scheduler: Any, prompt: RunPrompt, arguments: Mapping[str, Any]
) -> StepCallback | None:
    """Wraps a `callback_on_step_end` that asks for tensors so that it sees what the pipeline shows.

    Args:
        pipeline: The pipeline, which the callback gets as its first argument.
        scheduler: The run's own scheduler, for the timesteps.
        prompt: The run's; rewritten when the callback changes it.
        arguments: The engine call's arguments.
    """
    user: Callable[..., dict[str, Any]] | None = arguments.get("callback_on_step_end")
    names = arguments.get("callback_on_step_end_tensor_inputs", ["latents"])
    if user is None or not names:
        return None
    family = prompt.models[0].family
    conditioning = dict(prompt.conditioning)

    def callback(step: int, latents: Tensor) -> Tensor | None:
        timestep = scheduler.timesteps[step]
        pipeline._current_timestep = timestep
        embeds = {name: conditioning.get(key) for name, key in _EMBEDS.items()}
        seen = {"latents": family.to_callback(latents), **embeds}
        given = {name: seen[name] for name in names}
        with callers_modes():
            changed = user(pipeline, step, timestep, dict(given)) or {}
        new_embeds = {
            key: changed[name]
            for name, key in _EMBEDS.items()
            if changed.get(name) is not None and changed[name] is not embeds[name]
        }
        if new_embeds:
            # What changed before stays changed, and is what the next call sees.
            conditioning.update(new_embeds)
            prompt.rewrite(conditioning)
        new_latents = changed.get("latents")
        if new_latents is None or new_latents is given.get("latents"):
            return None
        return family.from_callback(new_latents, latents)

    return callback


def follow_replaced(
    plan: RunPlan, latents: Tensor, callback: StepCallback
) -> tuple[RunPlan, StepCallback, Tensor | None]:
    """Makes latents that a callback returns enter as the run's scheduler takes them.

    Args:
        plan: The run.
        latents: Its initial latents.
        callback: The callback.

    Returns:
        The plan and callback to run, and what is to be added to the final latents, if anything.
    """
    solver = plan.solver
    if solver.replacement is Replacement.LATENTS:
        return plan, callback, None

    def refuse(step: int, own: Tensor) -> Tensor | None:
        if callback(step, own) is not None:
            raise UnsupportedModelError(
                f"a callback replaced the latents, which this {solver.source} follows in no way "
                "that a run could (a corrector that is off in some steps); leave the latents as "
                "they are, or use another scheduler"
            )
        return None

    if solver.replacement is Replacement.UNKNOWN:
        return plan, refuse, None
    change = torch.zeros_like(latents)
    levels = torch.ones(plan.capacity, dtype=torch.float32, device="cpu")
    levels[: plan.policy.steps] = solver.levels()
    levels = levels.to(latents.device, non_blocking=True)
    buckets = [
        [bucket and ReplacedBucket(bucket, change, levels) for bucket in stage]
        for stage in plan.buckets
    ]
    cache = plan.cache
    if cache is not None and cache.signal is not None:
        cache = replace(cache, signal=ReplacedSignal(cache.signal, change))

    def note(step: int, own: Tensor) -> Tensor | None:
        replacement = callback(step, own)
        if replacement is not None:
            torch.sub(replacement.to(own), own, out=change)
        return None

    plan = replace(plan, buckets=buckets, shared=(*plan.shared, change), cache=cache)
    return plan, note, change


def progress_callback(
    pipeline: Any, scheduler: Any, arguments: Mapping[str, Any], bar: Any
) -> ProgressCallback | None:
    """The progress bar, and a `callback_on_step_end` that asks for no tensors.

    Such a callback need not come between two steps: an executor may go on while it runs.

    Args:
        pipeline: The pipeline, which the callback gets as its first argument.
        scheduler: The run's own scheduler, for the timesteps.
        arguments: The engine call's arguments.
        bar: A tqdm bar, or None.
    """
    user: Callable[..., dict[str, Any]] | None = arguments.get("callback_on_step_end")
    if arguments.get("callback_on_step_end_tensor_inputs", ["latents"]):
        user = None
    if user is None and bar is None:
        return None

    def advance(step: int) -> None:
        if user is not None:
            with callers_modes():
                changed = user(pipeline, step, scheduler.timesteps[step], {})
            if changed:
                raise ValueError(
                    f"callback_on_step_end returned {sorted(changed)} but asked for no tensors; "
                    "name what it changes in callback_on_step_end_tensor_inputs"
                )
        if bar is not None:
            bar.update()

    return advance
