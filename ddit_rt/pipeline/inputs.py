"""What a user passes to `compile` and `load`, checked before minutes are spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ddit_rt.adapters import AdapterSet, adaptable_layers, load_adapters
from ddit_rt.artifact import TokenRanges
from ddit_rt.artifact.plain import check_plain, check_unwrapped
from ddit_rt.buckets import StepModel, latent_frames
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.executor import FORMS
from ddit_rt.families import Family, family_of
from ddit_rt.patch_scheduler import parse_patch, patch_name
from ddit_rt.pipeline.planning import CompiledModel


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
    family = family_of(transformer)
    check_plain(transformer, "transformer")
    _check_device(transformer)
    if type(model).__name__ not in family.pipeline_classes:
        raise UnsupportedModelError(
            f"got a {type(model).__name__}; for this transformer the supported pipelines are "
            f"{list(family.pipeline_classes)}. Compile the bare transformer to run its loop alone"
        )
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
    if executor not in FORMS:
        raise ValueError(f"got executor={executor!r}; use one of {list(FORMS)}")
    device = next(transformer.parameters()).device
    if executor != "auto" and device.type != "cuda":
        raise ValueError(
            f"got executor={executor!r} for a model on {device}, which has one executor; leave it "
            'at "auto", or move the model with pipe.to("cuda") first'
        )


def parse_multiples(patch_sizes: Sequence[str | int]) -> tuple[int, ...]:
    """Patch sizes as ascending multiples of p, 1 among them."""
    multiples = tuple(sorted({parse_patch(patch) for patch in patch_sizes}))
    if not multiples or multiples[0] != 1:
        raise ValueError(
            f'got patch_sizes={list(patch_sizes)}; "p", the model\'s own, must be among them: the '
            "last steps need it"
        )
    return multiples


def find_adapters(
    adapter: str | Path | AdapterSet | None, family: Family, transformer: nn.Module
) -> AdapterSet:
    """Adapters that were passed, loaded from their folder if need be."""
    if adapter is None:
        return AdapterSet()
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


def check_size(
    family: Family,
    pipeline: Any,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    multiples: tuple[int, ...],
    ranges: TokenRanges,
) -> None:
    """Refuses a default picture size that could not run, before minutes of compiling."""
    rows, columns = family.default_size(pipeline)
    shape = family.latent_shape(pipeline, height or rows, width or columns, 1, num_frames)
    steps = StepModel(family=family, transformer=pipeline.transformer, base={})
    model = CompiledModel(steps=steps, multiples=multiples, ranges=ranges)
    model.offered(shape[-2], shape[-1], latent_frames(shape))
