"""What runs after each step: the user's callback in diffusers' form, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ddit_rt.buckets import RunContext, StepModel
from ddit_rt.executor import StepCallback


def pipeline_callback(
    pipeline: Any,
    model: StepModel,
    scheduler: Any,
    context: RunContext,
    arguments: Mapping[str, Any],
) -> StepCallback | None:
    """Wraps `callback_on_step_end` so that it sees what it would see in the pipeline.

    Args:
        pipeline: The pipeline, which the callback gets as its first argument.
        model: The model of the run.
        scheduler: The run's own scheduler, for the timesteps.
        context: The run; its text tokens are rewritten when the callback changes the prompt.
        arguments: The engine call's arguments.
    """
    user: Callable[..., dict[str, Any]] | None = arguments.get("callback_on_step_end")
    if user is None:
        return None
    names = arguments.get("callback_on_step_end_tensor_inputs", ["latents"])
    family = model.family
    embeds = context.conditioning["encoder_hidden_states"]

    def callback(step: int, latents: Tensor) -> Tensor | None:
        timestep = scheduler.timesteps[step]
        pipeline._current_timestep = timestep
        seen = {"latents": family.to_callback(latents), "prompt_embeds": embeds}
        given = {name: seen[name] for name in names}
        changed = user(pipeline, step, timestep, dict(given)) or {}
        new_embeds = changed.get("prompt_embeds")
        if new_embeds is not None and new_embeds is not embeds:
            conditioning = {**context.conditioning, "encoder_hidden_states": new_embeds}
            context.text.copy_(family.embed_text(model.transformer, conditioning))
        new_latents = changed.get("latents")
        if new_latents is None or new_latents is given.get("latents"):
            return None
        return family.from_callback(new_latents, latents)

    return callback


def with_progress(callback: StepCallback | None, bar: Any) -> StepCallback | None:
    """The callback, if any, and one tick of the bar, if any."""
    if bar is None:
        return callback

    def advance(step: int, latents: Tensor) -> Tensor | None:
        replacement = None if callback is None else callback(step, latents)
        bar.update()
        return replacement

    return advance
