"""What a user passes to `compile`, `load` and an engine, checked before any work is done on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt import checks
from ddit_rt.adapters import AdapterSet, adaptable_layers, load_adapters
from ddit_rt.artifact import Artifact
from ddit_rt.errors import ArtifactMismatchError, ShapeError, UnsupportedModelError
from ddit_rt.loop import FORMS
from ddit_rt.models import Family, family_of
from ddit_rt.models.arguments import check_arguments, check_sigmas, check_tensor
from ddit_rt.models.plain import check_plain, check_unwrapped
from ddit_rt.models.quantised import QUANTIZATIONS, check_machine, has_quantised
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.request import check_policy, parse_choice
from ddit_rt.policies import (
    DDiTPolicy,
    PatchPolicy,
    StepCache,
    as_step_cache,
    parse_patch,
    patch_name,
    policy_from_dict,
    step_cache_from_dict,
)
from ddit_rt.steps import StepModel, latent_frames

_NOT_STORED = "an artifact cannot hold one of a class of your own: pass it to the engine's call"


def unwrap(model: Any) -> tuple[Any, nn.Module, Family]:
    """Pipeline (or None), transformer and family of what the user passed."""
    if isinstance(model, nn.Module):
        check_unwrapped(model, "transformer")
        family = family_of(model)
        check_plain(model, "transformer")
        family.check_model(model, None)
        _check_device(model)
        return None, model, family
    transformer = getattr(model, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise UnsupportedModelError(
            f"got a {type(model).__name__}; pass a diffusers pipeline with a transformer, or the "
            "transformer itself"
        )
    check_unwrapped(transformer, "transformer")
    family_of(transformer)
    check_plain(transformer, "transformer")
    _check_device(transformer)
    family = family_of(transformer, model)
    family.check_model(transformer, model)
    return model, transformer, family


def _check_device(transformer: nn.Module) -> None:
    devices = {str(parameter.device) for parameter in transformer.parameters()}
    kinds = {name.partition(":")[0] for name in devices}
    if len(devices) > 1 or not kinds <= {"cpu", "cuda"}:
        raise UnsupportedModelError(
            f"the transformer is on {sorted(devices)}; it must be whole on the CPU or on one CUDA "
            'device: move it with pipe.to("cuda"), and do not use CPU offload'
        )


def check_executor(executor: str, transformer: nn.Module) -> None:
    """Refuses an executor that the model's device does not have."""
    checks.choice("executor", executor, FORMS)
    device = next(transformer.parameters()).device
    if executor != "auto" and device.type != "cuda":
        raise ValueError(
            f"got executor={executor!r} for a model on {device}, which has one executor; leave it "
            'at "auto", or move the model with pipe.to("cuda") first'
        )


def parse_multiples(patch_sizes: str | Sequence[str | int]) -> tuple[int, ...]:
    """Patch sizes, `("p", "2p")` or `"p,2p"`, as ascending multiples of p, 1 among them."""
    sizes = patch_sizes.split(",") if isinstance(patch_sizes, str) else patch_sizes
    expected = 'patch sizes, such as ("p", "2p")'
    named = checks.items("patch_sizes", sizes, expected)
    multiples = tuple(sorted({parse_patch(size, "patch_sizes") for size in named}))
    if not multiples or multiples[0] != 1:
        raise ValueError(
            f'got patch_sizes={checks.show(patch_sizes)}; "p", the model\'s own, must be among '
            "them: the last steps need it"
        )
    return multiples


def find_adapters(
    adapter: str | Path | AdapterSet | None, family: Family, transformer: nn.Module
) -> AdapterSet:
    """Adapters that were passed, loaded from their folder if need be."""
    if adapter is None:
        return AdapterSet()
    if not isinstance(adapter, AdapterSet):
        adapter = checks.path("adapter", adapter)
    adaptable_layers(family, transformer)
    if isinstance(adapter, AdapterSet):
        return adapter
    return load_adapters(adapter, family, transformer)


def check_adapters(adapters: AdapterSet, multiples: tuple[int, ...]) -> None:
    """Refuses adapters for sizes that are not offered."""
    unused = sorted(set(adapters.adapters) - set(multiples))
    if unused:
        raise ValueError(
            f"the adapters are for {adapters.names}, but patch_sizes offers only "
            f"{[patch_name(multiple) for multiple in multiples]}; add the sizes, or leave the "
            "adapters out"
        )


def check_quantization(
    kind: str, transformer: nn.Module, adapters: AdapterSet | None = None
) -> None:
    """Refuses a quantisation that model, adapters or machine do not take.

    Args:
        kind: What `compile` got, or an artifact says.
        transformer: The model, not quantised yet.
        adapters: Those that it is compiled with.

    Raises:
        ValueError, TypeError: No such kind.
        UnsupportedModelError: It cannot be done.
    """
    checks.choice("quantization", kind, QUANTIZATIONS)
    if has_quantised(transformer):
        raise UnsupportedModelError(
            f"got quantization={kind!r} for a transformer that is quantised already; leave it out: "
            "packages read the weights as they are"
        )
    if adapters is not None and any(one.lora for one in adapters.adapters.values()):
        raise UnsupportedModelError(
            f"got quantization={kind!r} with adapters that carry LoRA ({adapters.names}), which is "
            "not added to quantised layers; leave one of the two out"
        )
    weight = next(transformer.parameters())
    dtype = transformer.dtype
    assert isinstance(dtype, torch.dtype)
    check_machine(kind, weight.device, dtype)


def stored_policy(policy: PatchPolicy | str | None, multiples: Sequence[int]) -> PatchPolicy | None:
    """The default policy of a new artifact, as `compile` takes it.

    Args:
        policy: What came.
        multiples: Patch sizes of the artifact.

    Raises:
        TypeError: No policy.
        ValueError: A preset or a speed, or a policy that a manifest cannot hold.
        ShapeError: A policy for patch sizes that the artifact does not have.
    """
    if policy is None:
        return None
    choice = parse_choice(policy, DDiTPolicy())
    stored = choice if isinstance(choice, PatchPolicy) else None
    if stored is None:
        raise ValueError(
            f"got patch_policy={policy!r}; presets and speeds come from a calibration, which a new "
            "artifact does not have yet: calibrate it, and pass them to the engine's call"
        )
    if _reread(stored, policy_from_dict) != stored:
        raise ValueError(f"got patch_policy={checks.show(policy)}; {_NOT_STORED}")
    check_policy(stored, multiples)
    return stored


def stored_cache(step_cache: StepCache | str | None) -> StepCache | None:
    """The default step cache of a new artifact, as `compile` takes it.

    Raises:
        TypeError: No step cache.
        ValueError: One that a manifest cannot hold.
    """
    cache = as_step_cache(step_cache)
    if cache is not None and _reread(cache, step_cache_from_dict) != cache:
        raise ValueError(f"got step_cache={checks.show(step_cache)}; {_NOT_STORED}")
    return cache


def default_sizes(
    family: Family, pipeline: Any, height: int | None, width: int | None, num_frames: int | None
) -> dict[str, int]:
    """Sizes that were passed to `compile`, by name.

    Raises:
        TypeError, ValueError: No whole number, one that the family's pipelines know nothing of, or
            a bare transformer, whose latents say the size.
    """
    given = {"height": height, "width": width, "num_frames": num_frames}
    sizes = {name: checks.whole(name, size) for name, size in given.items() if size is not None}
    if sizes and pipeline is None:
        name, size = next(iter(sizes.items()))
        raise ValueError(
            f"got {name}={size} for a bare transformer, whose engine takes latents of any size; "
            "leave it out, or compile the whole pipeline"
        )
    check_size_names(family, sizes)
    return sizes


def check_size_names(family: Family, sizes: Mapping[str, Any]) -> None:
    """Refuses sizes by names that the family's pipelines know nothing of.

    Raises:
        ValueError: See above.
    """
    for name, size in sizes.items():
        if name not in family.size_names:
            raise ValueError(
                f"got {name}={size} for a model of the family {family.name}, whose size is "
                f"{' and '.join(family.size_names)}: leave {name} out"
            )


def check_size(compiled: CompiledModel, pipeline: Any, sizes: Mapping[str, Any]) -> None:
    """Refuses an image's or a video's size that could not run, before any work.

    Args:
        compiled: The model; its runners need not be there yet.
        pipeline: The diffusers pipeline.
        sizes: Those arguments of the pipeline's call that say the size, maybe among others; what is
            not there is the pipeline's default.

    Raises:
        ShapeError: See above.
    """
    family = compiled.steps.family
    height, width = family.call_size(pipeline, sizes)
    shape = family.latent_shape(pipeline, height, width, 1, sizes.get("num_frames"))
    compiled.offered(shape[-2], shape[-1], latent_frames(shape))


def _reread(stored: Any, from_dict: Any) -> Any:
    """What a manifest would give back; None where it cannot."""
    try:
        return from_dict(stored.to_dict())
    except (TypeError, ValueError):
        return None


DEFAULT_STEPS = 50
"""Steps of `Engine.denoise`."""

_SCHEDULER = "a diffusers flow scheduler, such as FlowMatchEulerDiscreteScheduler()"
_SETTABLE = (
    "schema_version",
    "policy",
    "step_cache",
    "pipeline_defaults",
    "calibrations",
    "cache_fits",
)
"""Entries of a manifest that may be others than when its engine was made."""


_OWN = ("patch_policy", "guidance_interval", "step_cache")
"""Arguments of a call that are the engine's own."""
_HOW_IT_RUNS = ("executor", "batched_guidance", "patch_sizes", "adapter", "ranges", "backend")
"""Arguments of `compile` that a caller may look for in the call."""


def check_call(
    compiled: CompiledModel,
    pipeline: Any,
    artifact: Artifact,
    prompt: Any,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of an engine's call, each checked by itself.

    Args:
        compiled: The compiled model.
        pipeline: The diffusers pipeline.
        artifact: The engine's, with the sizes that were passed to `compile`.
        prompt: The prompt or prompts.
        arguments: The other arguments of the pipeline's call that came.

    Returns:
        What came, as plain values, and the defaults where nothing did.

    Raises:
        TypeError, ValueError: An unknown argument, or a value that is none for its name.
        ShapeError: A size that cannot be run.
    """
    arguments, defaults = {"prompt": prompt, **arguments}, artifact.manifest.pipeline_defaults
    if elsewhere := [name for name in arguments if name in _HOW_IT_RUNS]:
        raise ValueError(
            f"got {elsewhere} in a call; how an engine runs is fixed for all of its calls: "
            "give that to ddit_rt.compile or ddit_rt.load"
        )
    given = {name: value for name, value in arguments.items() if _says_more(name, value, defaults)}
    checked = {**defaults, **check_arguments(pipeline, given, _OWN)}
    _check_step_counts(checked.get("num_inference_steps"), checked.get("sigmas"))
    check_size(compiled, pipeline, checked)
    return checked


def check_schedule(
    num_inference_steps: int | None, sigmas: Sequence[float] | None
) -> tuple[int, list[float] | None]:
    """Steps and noise levels of `Engine.denoise`.

    Raises:
        TypeError, ValueError: Values that are none, or a number of steps beside noise levels of
            another number.
    """
    steps = checks.optional(checks.whole, "num_inference_steps", num_inference_steps, 1)
    levels = checks.optional(check_sigmas, "sigmas", sigmas)
    _check_step_counts(steps, levels)
    return len(levels) if levels is not None else steps or DEFAULT_STEPS, levels


def check_scheduler(scheduler: Any, pipeline: Any) -> Any:
    """The scheduler of `Engine.denoise`; by default the pipeline's, or Euler's without one.

    Raises:
        TypeError: No scheduler, or the class of one.
    """
    if scheduler is None and pipeline is not None:
        return pipeline.scheduler
    if scheduler is None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()
    parts = ("set_timesteps", "step", "config")
    if isinstance(scheduler, type) or not all(hasattr(scheduler, part) for part in parts):
        advice = "call the class" if isinstance(scheduler, type) else ""
        raise TypeError(checks.got("scheduler", scheduler, _SCHEDULER, advice))
    return scheduler


def check_latents(latents: Tensor, model: StepModel) -> None:
    """Refuses initial latents of a shape that the model does not take.

    Raises:
        TypeError: No tensor of floating-point numbers.
        ShapeError: Not `[B, C, H, W]`, for videos `[B, C, F, H, W]`, for audio `[B, C, 1, T]`.
    """
    family = model.family
    channels = family.latent_channels(model.transformer)
    axes = "F, H, W" if family.video else "1, T" if family.audio else "H, W"
    check_tensor("latents", latents, f"[B, {channels}, {axes}]")
    rank = 2 + axes.count(",") + 1
    rows = latents.shape[-2:-1] if family.audio else (1,)
    if latents.ndim != rank or latents.shape[1] != channels or rows != (1,):
        raise ShapeError(
            f"latents have shape {list(latents.shape)}; expected [B, {channels}, {axes}]"
        )


def check_artifact(artifact: Artifact, current: Artifact) -> Artifact:
    """An artifact that takes the place of an engine's, with other calibrations or fits.

    Raises:
        TypeError: No artifact.
        ArtifactMismatchError: One of another model, or of other packages.
    """
    checks.instance("artifact", artifact, Artifact, "an artifact, such as engine.artifact")
    mine = current.manifest
    theirs = replace(artifact.manifest, **{name: getattr(mine, name) for name in _SETTABLE})
    if theirs != mine:
        raise ArtifactMismatchError(
            "got an artifact of another model or of other packages than this engine runs; set one "
            "that was made from engine.artifact, or load it with ddit_rt.load"
        )
    return artifact


def _check_step_counts(steps: int | None, sigmas: Sequence[float] | None) -> None:
    if steps is not None and sigmas is not None and steps != len(sigmas):
        raise ValueError(
            f"got num_inference_steps={steps} and {len(sigmas)} sigmas, which say the steps; leave "
            "one of them out"
        )


def _says_more(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether an argument is not just None for the default."""
    return value is not None or name not in defaults
