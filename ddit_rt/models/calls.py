"""Reading a diffusers pipeline call: its arguments, and the checks before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.arguments import call_defaults, check_arguments, check_tensor

_REFUSED_ARGUMENTS = {
    "ip_adapter_image": "IP-Adapter images",
    "ip_adapter_image_embeds": "IP-Adapter embeddings",
    "negative_ip_adapter_image": "IP-Adapter images",
    "negative_ip_adapter_image_embeds": "IP-Adapter embeddings",
    "joint_attention_kwargs": "joint_attention_kwargs",
    "attention_kwargs": "attention_kwargs",
    "skip_guidance_layers": "passes with fewer layers",
    "mu": "shifts of a call's own",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineCall:
    """A pipeline call whose arguments are checked.

    Attributes:
        arguments: All of the call's, defaults filled in.
        shape: Latent shape, `[B, C, H, W]`, of a video `[B, C, F, H, W]`.
        scales: Scale of classifier-free guidance of each expert; empty for a call without.
        passes: Passes that the pipeline may ask its transformer for in a step.
        ignored: Arguments that were given and that the pipeline ignores, each with its reason.
    """

    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    scales: tuple[float, ...]
    passes: int
    ignored: tuple[str, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether the call has classifier-free guidance."""
        return bool(self.scales)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCall:
    """A pipeline's call of its transformer.

    Attributes:
        latents: `[B, C, H, W]`, of a video `[B, C, F, H, W]`, in the pipeline's dtype.
        timestep: t in [0, 1], `[1]`; in float64 where float32 would round it.
        conditioning: Conditioning of this pass; every tensor has B samples.
    """

    latents: Tensor
    timestep: Tensor
    conditioning: dict[str, Any]


PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
"""Arguments that say how many images, or videos, of each prompt are made."""


def check_known(conditioning: Iterable[str], names: Sequence[str], model: str) -> None:
    """Refuses conditioning that a model would ignore."""
    unknown = sorted(set(conditioning) - set(names))
    if unknown:
        raise ValueError(f"unknown conditioning {unknown}; {model} takes {list(names)}")


def check_shape(
    name: str, value: Any, expected: Sequence[int | str], *, floating: bool = True
) -> None:
    """Refuses a missing or misshapen tensor.

    Args:
        name: The argument's name, for the message.
        value: What came.
        expected: Size of each dimension; a string names one that may be anything.
        floating: Whether its data type must be one of floating-point numbers.

    Raises:
        TypeError: No tensor, or of another data type.
        ValueError: It is missing.
        ShapeError: It has another shape.
    """
    wanted = "[" + ", ".join(str(dim) for dim in expected) + "]"
    if value is None:
        raise ValueError(f"`{name}` is missing; this model needs it as a tensor {wanted}")
    shape = check_tensor(name, value, wanted, floating=floating).shape
    fits = len(shape) == len(expected) and all(
        isinstance(dim, str) or dim == size for dim, size in zip(expected, shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"`{name}` has shape {list(shape)}; expected {wanted}")


def bind_call(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the pipeline's call, checked, defaults filled in."""
    return {**call_defaults(pipeline), **check_arguments(pipeline, arguments)}


def drop_steps(scheduler: Any, first: int) -> None:
    """Lets a schedule begin at its step `first`, in place."""
    if first:
        scheduler.timesteps, scheduler.sigmas = (
            table[first:] for table in (scheduler.timesteps, scheduler.sigmas)
        )
        scheduler.num_inference_steps = len(scheduler.timesteps)
        scheduler.set_begin_index(0)


def first_step(call: Mapping[str, Any], scheduler: Any) -> int:
    """Where a pipeline's `strength` lets its schedule begin; 0 without such an argument.

    Raises:
        ValueError: No step is left.
    """
    steps, strength = len(scheduler.timesteps), call.get("strength", 1.0)
    first = int(max(steps - min(steps * strength, steps), 0))
    if first >= steps:
        raise ValueError(
            f"got strength={strength} for {steps} steps, of which none is left; give a larger "
            "strength"
        )
    return first * int(scheduler.order)


def refuse_ignored(call: Mapping[str, Any]) -> None:
    """Refuses, by name, the arguments that the compiled model could only ignore."""
    for name, feature in _REFUSED_ARGUMENTS.items():
        value = call.get(name)
        if value is not None and not (isinstance(value, dict) and not value):
            raise UnsupportedModelError(
                f"got `{name}`: {feature} are no part of what was compiled, and would be ignored; "
                "leave the argument out, or call the diffusers pipeline itself"
            )


def prompts_of(call: Mapping[str, Any]) -> int:
    """Prompts of the call; 1 where there is none, which is refused elsewhere."""
    prompt, embeds = call["prompt"], call.get("prompt_embeds")
    if prompt is None:
        return 1 if embeds is None or not getattr(embeds, "ndim", 1) else len(embeds)
    return 1 if isinstance(prompt, str) else len(prompt)


def batch_of(call: Mapping[str, Any]) -> int:
    """Images, or videos, that the call makes."""
    per_prompt = (call[name] for name in PER_PROMPT if name in call)
    return prompts_of(call) * int(next(per_prompt, 1))


def model_arguments(
    arguments: Mapping[str, Any], names: Sequence[str], sized: Sequence[str] = ()
) -> dict[str, Any]:
    """Arguments of a transformer's call by name, after a refusal of what would be ignored.

    Args:
        arguments: Those that were given.
        names: Those that are known.
        sized: Those that say what the latents' shape says.

    Raises:
        UnsupportedModelError: Another one has a value that means something.
    """
    for name, value in arguments.items():
        if name in names or name in sized or value is None or value is False or value == {}:
            continue
        raise UnsupportedModelError(
            f"the pipeline gave its transformer `{name}`, which the compiled blocks could only "
            "ignore; leave out what asks for it, or call the diffusers pipeline itself"
        )
    return {name: arguments[name] for name in names if arguments.get(name) is not None}
