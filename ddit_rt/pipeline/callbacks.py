"""What runs beside the steps: the user's callback in diffusers' form, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ddit_rt.buckets import RunContext, StepModel
from ddit_rt.executor import ProgressCallback, StepCallback


def pipeline_callback(
    pipeline: Any,
    model: StepModel,
    scheduler: Any,
    context: RunContext,
    arguments: Mapping[str, Any],
) -> StepCallback | None:
    """Wraps a `callback_on_step_end` that asks for tensors so that it sees what the pipeline shows.

    Args:
        pipeline: The pipeline, which the callback gets as its first argument.
        model: The model of the run.
        scheduler: The run's own scheduler, for the timesteps.
        context: The run; its text tokens are rewritten when the callback changes the prompt.
        arguments: The engine call's arguments.
    """
    user: Callable[..., dict[str, Any]] | None = arguments.get("callback_on_step_end")
    names = arguments.get("callback_on_step_end_tensor_inputs", ["latents"])
    if user is None or not names:
        return None
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
            changed = user(pipeline, step, scheduler.timesteps[step], {})
            if changed:
                raise ValueError(
                    f"callback_on_step_end returned {sorted(changed)} but asked for no tensors; "
                    "name what it changes in callback_on_step_end_tensor_inputs"
                )
        if bar is not None:
            bar.update()

    return advance
