"""What a diffusers folder holds, and whether it can be run. Reads configurations, no weights."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddit_rt.blocks import TokenRanges
from ddit_rt.engine.cost import StepCost, step_cost
from ddit_rt.engine.inputs import check_size_names
from ddit_rt.errors import DditError, UnsupportedModelError
from ddit_rt.models import Family, family_of_classes
from ddit_rt.models.arguments import call_defaults
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.policies import patch_name
from ddit_rt.solver import solver_of
from ddit_rt.steps import StepModel, latent_frames

PIPELINE_FILE = "model_index.json"
MODEL_FILE = "config.json"

_MULTIPLES = (1, 2, 4)
_STEPS = 50
_TEXT_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeSupport:
    """What a size offers.

    Attributes:
        height: Pixel rows; 1 of audio.
        width: Pixel columns; samples of audio.
        num_frames: Frames of a video; None for what has none.
        seconds: Length of audio; None for images.
        latent: Shape of one sample's latent, without batch and channels.
        costs: By patch size: one pass of the model in one step.
        missing: Why the other patch sizes are not offered; why the size cannot be run, where
            `costs` is empty.
    """

    height: int
    width: int
    num_frames: int | None
    seconds: float | None
    latent: tuple[int, ...]
    costs: Mapping[str, StepCost]
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSupport:
    """What `inspect_folder` found.

    Attributes:
        pipeline_class: Class name of the pipeline; None for a bare transformer.
        transformer_class: Class name of its transformer; None where there is none.
        family: Name of the family that runs it; None where none does.
        problem: Why it cannot be run; empty where it can.
        driven: What takes its steps.
        dtype: Dtype of the weights that were counted.
        text_tokens: Text tokens that were counted with.
        passes: Passes of the model in a step of a call that says nothing of guidance.
        sizes: The default size, then the one that was asked for.
    """

    pipeline_class: str | None
    transformer_class: str | None
    family: str | None = None
    problem: str = ""
    driven: str = ""
    dtype: str = ""
    text_tokens: int = 0
    passes: int = 1
    sizes: tuple[SizeSupport, ...] = ()


def inspect_folder(
    folder: Path,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    audio_duration_s: float | None = None,
    text_tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> FolderSupport:
    """Looks at a diffusers folder.

    Args:
        folder: Folder of a pipeline (`model_index.json`) or of a transformer (`config.json`).
        height: Pixel rows of a size to count besides; by default the default size's.
        width: Pixel columns of the same.
        num_frames: Frames of the same.
        audio_duration_s: Length of audio to count besides, in seconds.
        text_tokens: Text tokens; by default as many as the pipeline's call takes at most.
        dtype: Dtype of the weights.

    Raises:
        ValueError: The folder is no such folder, a size by a name that the model's pipeline knows
            nothing of, or one for a bare transformer, whose pipeline alone says how many pixels a
            latent has.
    """
    sizes = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "audio_duration_s": audio_duration_s,
    }
    asked = {name: size for name, size in sizes.items() if size is not None}
    pipeline_class, transformer_class = _classes(folder)
    if pipeline_class is None and asked:
        raise ValueError(
            f"got {', '.join(asked)} for the folder of a transformer alone, which does not say how "
            "many pixels a latent has; give the folder of the whole pipeline"
        )
    found = FolderSupport(pipeline_class=pipeline_class, transformer_class=transformer_class)
    try:
        family, transformer, pipeline = _empty(folder, pipeline_class, transformer_class, dtype)
        driven = _driven(family, pipeline)
    except DditError as error:
        return replace(found, problem=str(error))
    found = replace(
        found,
        family=family.name,
        driven=driven,
        dtype=str(dtype).removeprefix("torch."),
        passes=family.default_passes(),
    )
    if pipeline is None:
        return found
    check_size_names(family, asked)
    text = _text_tokens(pipeline) if text_tokens is None else text_tokens
    wanted: list[Mapping[str, Any]] = [{}, asked] if asked else [{}]
    model = StepModel(family=family, transformer=transformer, base={})
    found_sizes = tuple(_size(model, pipeline, text, size) for size in wanted)
    return replace(found, text_tokens=text, sizes=found_sizes)


def _classes(folder: Path) -> tuple[str | None, str | None]:
    """Class names of pipeline and transformer."""
    for name in (PIPELINE_FILE, MODEL_FILE):
        if (folder / name).is_file():
            config = _read(folder / name)
            own = config.get("_class_name")
            if not isinstance(own, str):
                raise ValueError(f"{folder / name} names no class of diffusers (_class_name)")
            if name == MODEL_FILE:
                return None, own
            entry = config.get("transformer") or [None, None]
            return own, entry[1]
    raise ValueError(
        f"{folder} holds neither {PIPELINE_FILE} of a pipeline nor {MODEL_FILE} of a transformer; "
        "give a folder that save_pretrained has written"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a JSON object ({error})") from error


def _empty(
    folder: Path, pipeline_class: str | None, transformer_class: str | None, dtype: torch.dtype
) -> tuple[Family, nn.Module, Any]:
    """Family, transformer and pipeline, whose models have shapes and no memory.

    Raises:
        UnsupportedModelError: It cannot be run.
    """
    if transformer_class is None:
        raise UnsupportedModelError(f"{pipeline_class} has no transformer")
    index = None if pipeline_class is None else _read(folder / PIPELINE_FILE)
    family = family_of_classes(_diffusers_class(transformer_class), pipeline_class, index)
    if pipeline_class is None:
        transformer: nn.Module = _empty_part(folder, transformer_class, dtype)
        family.check_model(transformer, None)
        return family, transformer, None
    pipeline = _empty_pipeline(folder, pipeline_class, dtype)
    family.check_model(pipeline.transformer, pipeline)
    return family, pipeline.transformer, pipeline


def _empty_pipeline(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A pipeline without text encoders, tokenizers and weights."""
    index, kind = _read(folder / PIPELINE_FILE), _diffusers_class(name)
    parts: dict[str, Any] = {}
    for part, parameter in inspect.signature(kind.__init__).parameters.items():
        value, required = index.get(part), parameter.default is inspect.Parameter.empty
        # As from_pretrained has it: anything else is handed on as it stands in the index.
        loaded = required or part in getattr(kind, "_optional_components", ())
        if isinstance(value, list) and loaded:
            library, cls = value
            own = library == "diffusers" and cls is not None
            value = _empty_part(folder / part, cls, dtype) if own else None
        elif part not in index and not required:
            continue
        if part != "self":
            parts[part] = value
    return kind(**parts)


def _empty_part(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A model on the meta device, or a scheduler."""
    kind = _diffusers_class(name)
    file = MODEL_FILE if issubclass(kind, nn.Module) else kind.config_name
    if not (folder / file).is_file():
        raise UnsupportedModelError(f"{folder / file} is missing, which describes the {name}")
    config = _read(folder / file)
    quantised = config.pop("quantization_config", None) or {}
    if quantised.get("quant_method", "torchao") != "torchao":
        raise UnsupportedModelError(
            f"the {name} has weights quantised by {quantised['quant_method']}, which compiled "
            "blocks do not run; load it in bfloat16 or float32"
        )
    try:
        with torch.device("meta" if issubclass(kind, nn.Module) else "cpu"):
            part = kind.from_config(config)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"the {name} cannot be built from its own configuration ({error})"
        ) from error
    if isinstance(part, nn.Module):
        kept = set(getattr(part, "_keep_in_fp32_modules", None) or ())
        for path, parameter in part.named_parameters():
            if not kept & set(path.split(".")):  # as from_pretrained does
                parameter.data = parameter.data.to(dtype)
    return part


def _diffusers_class(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type):
        raise UnsupportedModelError(
            f"got a {name}, which diffusers {diffusers.__version__} does not have"
        )
    return kind


def _driven(family: Family, pipeline: Any) -> str:
    """What takes the steps of a pipeline's call."""
    if pipeline is None:
        return "the compiled loop, by engine.denoise"
    problem = family.own_loop or _scheduler_problem(family, pipeline)
    if problem:
        return f"the pipeline's own loop: {problem}"
    return (
        "the compiled loop, inside the pipeline's own call; the pipeline's own loop with a "
        "callback_on_step_end"
    )


def _scheduler_problem(family: Family, pipeline: Any) -> str:
    """Why no table stands for the pipeline's scheduler; empty where one does."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    rows, columns = family.default_size(pipeline)
    shape = family.latent_shape(pipeline, rows, columns, 1, family.default_frames(pipeline))
    model = StepModel(family=family, transformer=pipeline.transformer, base={})
    grid = model.grid(shape[-2], shape[-1], frames=latent_frames(shape))
    family.set_timesteps(scheduler, _STEPS, None, grid)
    return solver_of(scheduler)[1]


def _text_tokens(pipeline: Any) -> int:
    """The most text tokens that the pipeline's call takes."""
    return int(call_defaults(pipeline).get("max_sequence_length") or _TEXT_TOKENS)


def _size(
    model: StepModel, pipeline: Any, text_tokens: int, call: Mapping[str, Any]
) -> SizeSupport:
    """What the size that some arguments of the pipeline's call say offers."""
    family = model.family
    height, width = family.call_size(pipeline, call)
    num_frames = call.get("num_frames", family.default_frames(pipeline))
    latent: tuple[int, ...] = ()
    costs: dict[str, StepCost] = {}
    ranges = TokenRanges(**family.default_ranges)
    sized = CompiledModel(steps=model, multiples=_MULTIPLES, ranges=ranges)
    try:
        shape = family.latent_shape(pipeline, height, width, 1, num_frames)
        latent, frames = shape[2:], latent_frames(shape)
        offered, missing = sized.offered(shape[-2], shape[-1], frames)
        for multiple in offered:
            costs[patch_name(multiple)] = step_cost(
                model,
                height=shape[-2],
                width=shape[-1],
                multiple=multiple,
                batch=1,
                text_tokens=text_tokens,
                frames=frames,
            )
    except DditError as error:
        costs, missing = {}, (str(error),)
    return SizeSupport(
        height=height,
        width=width,
        num_frames=num_frames,
        seconds=width / pipeline.sample_rate if family.audio else None,
        latent=latent,
        costs=costs,
        missing=missing,
    )
