"""Reading a diffusers pipeline call: its arguments, and the checks before any work is done."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ddit_rt.errors import ShapeError, UnsupportedModelError

_REFUSED_ARGUMENTS = {
    "ip_adapter_image": "IP-Adapter images",
    "ip_adapter_image_embeds": "IP-Adapter embeddings",
    "negative_ip_adapter_image": "IP-Adapter images",
    "negative_ip_adapter_image_embeds": "IP-Adapter embeddings",
    "joint_attention_kwargs": "joint_attention_kwargs",
    "attention_kwargs": "attention_kwargs",
}


def check_known(conditioning: Iterable[str], names: Sequence[str], model: str) -> None:
    """Refuses conditioning that a model would ignore."""
    unknown = sorted(set(conditioning) - set(names))
    if unknown:
        raise ValueError(f"unknown conditioning {unknown}; {model} takes {list(names)}")


def check_shape(name: str, value: Tensor | None, expected: Sequence[int | str]) -> None:
    """Refuses a missing or misshapen tensor.

    Args:
        name: The argument's name, for the message.
        value: What came.
        expected: Size of each dimension; a string names one that may be anything.

    Raises:
        ValueError: It is missing.
        ShapeError: It has another shape.
    """
    wanted = "[" + ", ".join(str(dim) for dim in expected) + "]"
    if value is None:
        raise ValueError(f"`{name}` is missing; this model needs it as a tensor {wanted}")
    fits = value.ndim == len(expected) and all(
        isinstance(dim, str) or dim == size for dim, size in zip(expected, value.shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"`{name}` has shape {list(value.shape)}; expected {wanted}")


def bind_call(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the pipeline's call, defaults filled in; an unknown one is an error."""
    signature = inspect.signature(type(pipeline).__call__)
    unknown = sorted(set(arguments) - set(signature.parameters))
    if unknown:
        raise ValueError(
            f"unknown arguments {unknown}; {type(pipeline).__name__} takes "
            f"{[name for name in signature.parameters if name != 'self']}"
        )
    bound = signature.bind(pipeline, **arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def refuse_ignored(call: Mapping[str, Any]) -> None:
    """Refuses, by name, the arguments that the compiled model could only ignore."""
    for name, feature in _REFUSED_ARGUMENTS.items():
        value = call.get(name)
        if value is not None and value != {}:
            raise UnsupportedModelError(
                f"got `{name}`: {feature} change the blocks that were compiled, and would be "
                "ignored; leave the argument out, or call the diffusers pipeline itself"
            )


def batch_of(call: Mapping[str, Any], per_prompt: str = "num_images_per_prompt") -> int:
    """Pictures, or videos, that the call makes; `per_prompt` names the argument that counts."""
    prompt = call["prompt"]
    if prompt is None:
        prompts = int(call["prompt_embeds"].shape[0])
    else:
        prompts = 1 if isinstance(prompt, str) else len(prompt)
    return prompts * int(call[per_prompt])
