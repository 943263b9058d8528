"""Arguments of a pipeline's call, checked by name before any work is done.

One table serves all pipelines: an argument of one name means the same in each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit_rt import checks
from ddit_rt.errors import ShapeError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

_TEXTS = tuple(
    f"{prefix}prompt{suffix}" for prefix in ("", "negative_") for suffix in ("", "_2", "_3")
)
_ENCODERS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
_MOST_NOISE = 1 + 1e-6
"""1, with the rounding of those who compute it in float32."""

_LEAST_NOISE = 1e-6
"""Below it schedulers divide by what is 0 in float32."""


def check_arguments(
    pipeline: Any, arguments: Mapping[str, Any], own: Sequence[str] = ()
) -> dict[str, Any]:
    """Arguments of the pipeline's call as plain values; those that were given, no others.

    Args:
        pipeline: A diffusers pipeline.
        arguments: What came.
        own: Names that the caller takes besides, for messages.

    Raises:
        ValueError, TypeError: An unknown argument, or a value that is none for its name.
    """
    defaults = call_defaults(pipeline)
    checks.refuse_unknown(arguments, [*own, *defaults], f"an engine of {type(pipeline).__name__}")
    lists = _tensor_lists(type(pipeline).__call__)
    return {
        name: _tensors(name, value)
        if name in lists and value is not None
        else _checked(name, value, defaults[name])
        for name, value in arguments.items()
    }


def call_defaults(pipeline: Any) -> Mapping[str, Any]:
    """Defaults of the pipeline's call by argument; `inspect.Parameter.empty` where it has none."""
    return _defaults_of(type(pipeline).__call__)


def default_of(pipeline: Any, name: str) -> int:
    """What the pipeline's call takes for a size that is not given."""
    return int(call_defaults(pipeline)[name])


@lru_cache(maxsize=8)
def _defaults_of(call: Callable[..., Any]) -> Mapping[str, Any]:
    parameters = inspect.signature(call).parameters
    return {name: one.default for name, one in parameters.items() if name != "self"}


def check_sigmas(name: str, value: Any) -> list[float]:
    """Noise levels of the steps: at least one, falling, from 1 to 1e-6.

    Raises:
        TypeError: No sequence of numbers.
        ValueError: Other numbers.
    """
    sigmas = checks.numbers(name, value)
    expected = (
        f"noise levels that fall from step to step, from 1 at most to {_LEAST_NOISE} at least"
    )
    if sigmas[-1] == 0:
        advice = "leave the 0 at the end out, which the scheduler adds"
        raise ValueError(checks.got(name, value, expected, advice))
    levels = np.asarray(sigmas, dtype=np.float32)
    falls = bool((levels[1:] < levels[:-1]).all())
    if not falls or sigmas[0] > _MOST_NOISE or sigmas[-1] < _LEAST_NOISE:
        raise ValueError(checks.got(name, value, expected))
    return list(sigmas)


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuses a number of steps that the model has not as many noise levels for.

    Raises:
        ValueError: It is not positive, or larger than the scheduler's training steps.
    """
    most = int(scheduler.config.get("num_train_timesteps", 1000))
    checks.whole("num_inference_steps", steps, 1, most)


def noise_levels(scheduler: Any, steps: int, sigmas: Sequence[float] | None) -> list[float] | None:
    """Noise levels that an image pipeline gives its scheduler; None where that makes its own.

    Args:
        scheduler: The run's.
        steps: Number of steps.
        sigmas: Those of the call, if it names some.

    Raises:
        ValueError: Too many steps, or levels that the scheduler would ignore.
    """
    check_steps(scheduler, steps)
    own = scheduler.config.get("use_flow_sigmas", False)
    if sigmas is not None and own:
        raise ValueError(
            f"got sigmas for a {type(scheduler).__name__} with use_flow_sigmas=True, which "
            "makes its own and would ignore them; leave them out"
        )
    if own:
        return None
    return list(np.linspace(1.0, 1 / steps, steps).tolist() if sigmas is None else sigmas)


def check_tensor(name: str, value: Any, expected: str, *, floating: bool = True) -> Tensor:
    """A tensor with data.

    Args:
        name: The argument's name.
        value: What came.
        expected: Its shape, for the message.
        floating: Whether its data type must be one of floating-point numbers.

    Raises:
        TypeError: No tensor, or of another data type.
        ValueError: A tensor without data, on the device `meta`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(checks.got(name, value, f"a tensor {expected}"))
    if floating and not value.is_floating_point():
        advice = "convert it with .float()"
        raise TypeError(checks.got(name, value, "a tensor of floating-point numbers", advice))
    if value.is_meta:
        raise ValueError(checks.got(name, value, "a tensor with data, not on the device meta"))
    return value


def check_given_embeds(
    name: str, value: Tensor, shape: Sequence[int | str], batch: int, per_prompt: str
) -> None:
    """Refuses embeddings of another shape, and of another number of prompts than the call's.

    Args:
        name: The argument's name.
        value: What came.
        shape: Sizes of the dimensions behind the first; a string names one that may be anything.
        batch: Images, or videos, that the call makes.
        per_prompt: The argument that counts those of a prompt.

    Raises:
        ShapeError: See above.
    """
    fits = value.ndim == len(shape) + 1 and all(
        isinstance(dim, str) or dim == size
        for dim, size in zip(shape, value.shape[1:], strict=True)
    )
    if not fits:
        wanted = ", ".join(str(dim) for dim in ("prompts", *shape))
        raise ShapeError(f"`{name}` has shape {list(value.shape)}; expected [{wanted}]")
    if len(value) not in (1, batch):
        raise ShapeError(
            f"`{name}` has shape {list(value.shape)} for a call that makes {batch}; expected 1 or "
            f"{batch} rows: embeddings are not repeated by {per_prompt}"
        )


def check_texts(call: Mapping[str, Any], prompts: int) -> None:
    """Refuses texts beside embeddings that say the same, and lists that are not as many as prompts.

    Raises:
        ValueError: See above.
    """
    for name in (name for name in _TEXTS if call.get(name) is not None):
        embeds = "negative_prompt_embeds" if name.startswith("negative") else "prompt_embeds"
        if call.get(embeds) is not None:
            raise ValueError(f"got both {name} and {embeds}; give one of them")
        texts = call[name]
        if isinstance(texts, list) and len(texts) != prompts:
            raise ValueError(
                f"got {name} with {len(texts)} texts for {prompts} prompts; give one for each, or "
                "one text for all"
            )


def is_empty(value: Any) -> bool:
    """Whether an argument says nothing: None, or no text."""
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and not value)


def check_output(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Refuses an output that the pipeline cannot make, before it would fail at it.

    Raises:
        ValueError: Images or videos are asked of a pipeline without a VAE.
    """
    if call["output_type"] != "latent" and getattr(pipeline, "vae", pipeline) is None:
        raise ValueError(
            f"got output_type={call['output_type']!r} for a pipeline without a VAE, which decodes; "
            'pass output_type="latent", or load the VAE'
        )


def check_callback(name: str, value: Any) -> Any:
    """A function, or None.

    Raises:
        TypeError: Something that cannot be called.
    """
    if value is not None and not callable(value):
        raise TypeError(checks.got(name, value, "a function"))
    return value


def check_text_encoders(pipeline: Any, call: Mapping[str, Any], *, guided: bool) -> None:
    """Refuses texts for a pipeline that has nothing to encode them with.

    Args:
        pipeline: The pipeline; an `encode_prompt` that is not diffusers' own may do without.
        call: All arguments of its call.
        guided: Whether there is classifier-free guidance. Without a negative prompt its text is
            empty, but a text.

    Raises:
        ValueError: See above.
    """
    negative = guided and call.get("negative_prompt_embeds") is None
    missing = [name for name in _ENCODERS if getattr(pipeline, name, pipeline) is None]
    own = str(getattr(pipeline.encode_prompt, "__module__", "")).startswith("diffusers.")
    if own and missing and (negative or call["prompt"] is not None):
        which = "prompt" if call["prompt"] is not None else "negative_prompt"
        raise ValueError(
            f"got {which} as text for a pipeline without {', '.join(missing)}; pass "
            f"{which}_embeds, or load what is missing"
        )


@lru_cache(maxsize=8)
def _tensor_lists(call: Callable[..., Any]) -> frozenset[str]:
    """Embeddings that a pipeline's call takes as a list, by its annotations."""
    parameters = inspect.signature(call).parameters
    return frozenset(
        name
        for name in ("prompt_embeds", "negative_prompt_embeds")
        if name in parameters and "list[torch" in str(parameters[name].annotation).lower()
    )


def _tensors(name: str, value: Any) -> list[Tensor]:
    expected = "a list with a tensor [text tokens, width] for each prompt"
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(checks.got(name, value, expected))
    each = "[text tokens, width]"
    return [check_tensor(f"{name}[{place}]", one, each) for place, one in enumerate(value)]


def _checked(name: str, value: Any, default: Any) -> Any:
    check = _CHECKS.get(name)
    if check is None or (value is None and default is None):
        return value
    if value is None:
        raise TypeError(f"got {name}=None; leave it out for its default, {checks.show(default)}")
    return check(name, value)


def _prompt(name: str, value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value
    expected = "a text, or a list of at least one text"
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise TypeError(checks.got(name, value, expected))
    if not value:
        raise ValueError(checks.got(name, value, expected))
    return list(value)


def _generator(name: str, value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(g, torch.Generator) for g in value):
        return list(value)
    advice = f"torch.Generator().manual_seed({value})" if isinstance(value, int) else ""
    expected = "a torch.Generator, or a list with one for each image or video"
    raise TypeError(checks.got(name, value, expected, advice))


def _names(name: str, value: Any) -> list[str]:
    names = checks.items(name, value, "a list of names")
    for place, one in enumerate(names):
        checks.instance(f"{name}[{place}]", one, str, "a name")
    return list(names)


_count = partial(checks.whole, least=1)
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"), _prompt),
    # What sizes a model can make, its family says.
    **dict.fromkeys(("height", "width", "num_frames"), checks.whole),
    **dict.fromkeys(
        ("num_inference_steps", "num_images_per_prompt", "num_videos_per_prompt"), _count
    ),
    **dict.fromkeys(
        (
            *("guidance_scale", "guidance_scale_2", "true_cfg_scale"),
            *("stg_scale", "modality_scale", "guidance_rescale"),
        ),
        checks.number,
    ),
    **dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds"),
        partial(check_tensor, expected="[prompts, text tokens, width]"),
    ),
    **dict.fromkeys(
        ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        partial(check_tensor, expected="[prompts, width]"),
    ),
    "latents": partial(check_tensor, expected="as the pipeline takes it"),
    "max_sequence_length": _count,
    "sigmas": check_sigmas,
    "strength": partial(checks.number, low=0, high=1),
    **dict.fromkeys(
        ("audio_duration_s", "frame_rate"), partial(checks.number, low=0, open_low=True)
    ),
    "generator": _generator,
    "output_type": partial(checks.choice, options=OUTPUT_TYPES),
    "return_dict": checks.flag,
    "callback_on_step_end": check_callback,
    "callback_on_step_end_tensor_inputs": _names,
}
