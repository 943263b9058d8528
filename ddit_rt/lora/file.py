"""A LoRA file, read whole and held against the pipeline before anything is loaded.

diffusers skips what it finds no place for, and widens layers that are too narrow. An engine takes
in the whole file or refuses it, so every entry must belong to a layer of the right shape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.plain import quantised_by
from ddit_rt.models.structure import parts

_PREFIX = "transformer"
"""Prefix of a transformer's entries, whichever expert the file is for."""

_TEXT = "text_encoder"
_READING: Mapping[str, Any] = {
    "cache_dir": None,
    "force_download": False,
    "local_files_only": None,
    "proxies": None,
    "revision": None,
    "subfolder": None,
    "token": None,
    "use_safetensors": None,
    "weight_name": None,
}
"""Arguments of `load_lora_weights` that say where a file is."""

_ENTRY = re.compile(r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?)")
_SHOWN = 20
_FUSED_QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """What a LoRA file holds, every entry with its place in a pipeline.

    Attributes:
        layers: Factors by component prefix, as diffusers names them.
        norms: Whole values of norm weights, by parameter of the transformer.
        alphas: Scales that the file keeps beside the factors.
        metadata: PEFT's configuration from the file's header, if it has one.
    """

    layers: Mapping[str, dict[str, Tensor]]
    norms: Mapping[str, Tensor]
    alphas: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that loading would ignore, or that are the engine's own business.

    Raises:
        ValueError: The message names them.
    """
    for name in ("adapter_name", "hotswap"):
        if name in arguments:
            raise ValueError(
                f"got {name}={arguments[name]!r}; the engine fuses a LoRA into the weights and "
                "leaves no adapter behind that could have it: leave it out"
            )
    unknown = sorted(arguments.keys() - _READING.keys())
    if unknown:
        raise ValueError(f"got unknown arguments {unknown}; fuse_lora takes {sorted(_READING)}")


def read_lora(
    pipeline: Any, lora: Any, targets: Mapping[str, nn.Module | None], arguments: Mapping[str, Any]
) -> LoraFile:
    """Reads a LoRA, and holds it against the models that it is for.

    Args:
        pipeline: The pipeline, whose `lora_state_dict` knows the formats.
        lora: A path, a Hub name or a state dict.
        targets: The models by the prefix of their entries; None where the pipeline has none.
        arguments: Where the file is, as `load_lora_weights` takes it.

    Raises:
        TypeError: `lora` is neither a name nor a state dict.
        ValueError: diffusers cannot read it, or it has values that are not finite.
        UnsupportedModelError: An entry has no place, or would change the shape of a layer.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        raise UnsupportedModelError(
            f"got a LoRA for a {type(pipeline).__name__}, which diffusers loads none for; fuse it "
            "into the weights before you compile"
        )
    raw, metadata = _fetch(lora, arguments)
    converted, alphas = _convert(pipeline, raw)
    _refuse_dropped(raw, converted)
    _refuse_not_finite(converted)
    norm_keys = getattr(pipeline, "_control_lora_supported_norm_keys", ())
    norms, layers, strange = _sort(converted, norm_keys, targets)
    strange += [name for name in alphas or {} if name.partition(".")[0] not in targets]
    strange += _strange_norms(norms, targets[_PREFIX])
    for prefix, state in layers.items():
        strange += _check_layers(prefix, targets[prefix], state, alphas or {})
    if strange:
        shown = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
        raise UnsupportedModelError(
            f"the LoRA has {len(strange)} of {len(converted)} entries that have no place in this "
            f"pipeline ({shown}); take one that was made for this model, or leave these out"
        )
    if not any(layers.values()) and not norms:
        raise UnsupportedModelError(
            "the LoRA has no layer of this pipeline; there is nothing to fuse"
        )
    return LoraFile(layers=layers, norms=norms, alphas=alphas, metadata=metadata)


def _fetch(lora: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """The entries as the file has them: conversion drops some, and does not say which."""
    # Imported here: it pulls in much of diffusers.
    from diffusers.loaders.lora_base import _fetch_state_dict

    if isinstance(lora, Mapping):
        strange = [name for name, value in lora.items() if not isinstance(value, (Tensor, float))]
        if strange or not lora:
            raise TypeError(
                f"got a LoRA of {len(lora)} entries, {len(strange)} of them no tensors; expected a "
                "state dict of tensors, a path or a Hub name"
            )
        return dict(lora), None
    if not isinstance(lora, (str, os.PathLike)):
        raise TypeError(
            f"got a {type(lora).__name__} for a LoRA; expected a path, a Hub name or a state dict"
        )
    where = {**_READING, **arguments}
    pickle = where["use_safetensors"] is None
    found, metadata = _fetch_state_dict(
        pretrained_model_name_or_path_or_dict=lora,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=pickle,
        **{**where, "use_safetensors": pickle or where["use_safetensors"]},
    )
    return found, metadata


def _convert(pipeline: Any, raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Entries under diffusers' names, and alphas apart where the family has them so."""
    try:
        found = pipeline.lora_state_dict(dict(raw), return_alphas=True)
    except (ArithmeticError, AttributeError, AssertionError, LookupError, ValueError) as error:
        raise ValueError(
            f"diffusers cannot read this LoRA ({type(error).__name__}: {error}); take one in its "
            "own, PEFT's or Kohya's format"
        ) from error
    except (NotImplementedError, TypeError) as error:
        raise ValueError(f"diffusers cannot read this LoRA: {error}") from error
    return found if isinstance(found, tuple) else (found, None)


def _refuse_dropped(raw: Mapping[str, Any], converted: Mapping[str, Tensor]) -> None:
    """Refuses what diffusers leaves out while it converts, unless it is nothing but zeros."""
    kept = {id(tensor) for tensor in converted.values()}
    dropped = [
        name
        for name, value in raw.items()
        if "dora_scale" in name
        or name.startswith("lora_te2_")
        or (".diff" in name and id(value) not in kept and bool(value.any()))
    ]
    if dropped:
        raise UnsupportedModelError(
            f"the LoRA has {len(dropped)} entries that diffusers leaves out ({dropped[:3]}, ...): "
            "DoRA scales, whole differences or a second text encoder; take a plain LoRA"
        )


def _refuse_not_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the LoRA's {name} has values that are not finite; take another file")


def _sort(
    state: Mapping[str, Tensor],
    norm_keys: Sequence[str],
    targets: Mapping[str, nn.Module | None],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], list[str]]:
    """Norms of the transformer, factors by prefix, and entries of neither."""
    norms: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in targets}
    strange = []
    for name, tensor in state.items():
        prefix, _, rest = name.partition(".")
        if prefix not in targets:
            strange.append(name)
        elif prefix == _PREFIX and "lora" not in name and any(key in name for key in norm_keys):
            norms[rest] = tensor
        else:
            layers[prefix][name] = tensor
    return norms, layers, strange


def _strange_norms(norms: Mapping[str, Tensor], transformer: nn.Module | None) -> list[str]:
    own = {} if transformer is None else dict(transformer.named_parameters())
    return [
        f"{_PREFIX}.{name}"
        for name, value in norms.items()
        if name not in own or own[name].shape != value.shape
    ]


def _check_layers(
    prefix: str, model: nn.Module | None, state: Mapping[str, Tensor], alphas: Mapping[str, Any]
) -> list[str]:
    """Entries of one component that belong to none of its layers."""
    scales = [name for name in alphas if name.startswith(f"{prefix}.")]
    if not state:
        return scales
    if model is None:
        raise UnsupportedModelError(
            f"the LoRA has layers for a {prefix}, and this pipeline has none; load the pipeline "
            f"with its {prefix}, or leave these layers out"
        )
    how = quantised_by(model)
    if how is not None:
        raise UnsupportedModelError(
            f"the LoRA has layers for the {prefix}, which is quantised with {how}; load it in "
            "bfloat16 or float32, or leave these layers out"
        )
    strange, found = _by_layer(_peft_names(prefix, model, state))
    modules = dict(parts(model))
    for path, factors in found.items():
        layer = modules.get(path)
        whole = "lora_A.weight" in factors and "lora_B.weight" in factors
        if not whole or not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            strange += [f"{path}.{name}" for name in factors]
        else:
            _check_shape(f"{prefix}.{path}", layer, factors)
            _refuse_fused_projection(prefix, path, modules)
    cut = _cut(prefix, model)
    for name in scales:
        path = name.removeprefix(f"{prefix}.").removeprefix(cut).removesuffix(".alpha")
        if path not in found:
            strange.append(name)
    return [name if name.startswith(f"{prefix}.") else f"{prefix}.{name}" for name in strange]


def _cut(prefix: str, model: nn.Module) -> str:
    """What a file's names have in front that the model's have not: newer CLIP models are flat."""
    return "text_model." if prefix == _TEXT and not hasattr(model, "text_model") else ""


def _peft_names(prefix: str, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries as diffusers renames them while it loads, without the prefix."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items()}
    if prefix != _TEXT:
        in_peft = "lora_A" in next(iter(own))
        return own if in_peft else dict(convert_unet_state_dict_to_peft(own))
    try:
        renamed = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    except ValueError:
        return own
    cut = _cut(prefix, model)
    return {name.removeprefix(cut): tensor for name, tensor in renamed.items()}


def _by_layer(state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, dict[str, Tensor]]]:
    strange: list[str] = []
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _ENTRY.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    return strange, found


def _check_shape(where: str, layer: nn.Module, factors: Mapping[str, Tensor]) -> None:
    down, up = factors["lora_A.weight"], factors["lora_B.weight"]
    weight = layer.get_parameter("weight")
    made = (*up.shape[:1], *down.shape[1:])
    if made != tuple(weight.shape) or up.shape[1] != down.shape[0]:
        raise UnsupportedModelError(
            f"the LoRA is for a {where} of {list(made)} and rank {down.shape[0]} or {up.shape[1]}; "
            f"this one has {list(weight.shape)}, and a LoRA that widens layers (a control LoRA) is "
            "not taken: use one that was made for this model"
        )
    if "lora_B.bias" in factors and getattr(layer, "bias", None) is None:
        raise UnsupportedModelError(
            f"the LoRA has a bias for {where}, which has none; use one that was made for this model"
        )


def _refuse_fused_projection(prefix: str, path: str, modules: Mapping[str, nn.Module]) -> None:
    parent, _, name = path.rpartition(".")
    if name in _FUSED_QKV and getattr(modules.get(parent), "fused_projections", False):
        raise UnsupportedModelError(
            f"the LoRA changes {prefix}.{path}, which is not read while projections are fused; "
            f"call {prefix}.unfuse_qkv_projections() before compiling"
        )
