"""A LoRA file, read whole and held against the pipeline before anything is loaded.

diffusers skips what it finds no place for, and widens layers that are too narrow. An engine takes
in the whole file or refuses it, so every entry must belong to a layer of the right shape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from safetensors import SafetensorError
from torch import Tensor, nn

from ddit_rt import checks
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

_LORA = re.compile(r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?)")
_LOKR = re.compile(r"(.+)\.(lokr_w[12](?:_[ab])?)")
"""Entries of a layer. A file that has one of LoKr has no other kind: diffusers would skip it."""

_ENDING = ".safetensors"
_NO_PICKLE = (
    "a LoRA is read as safetensors alone, since a pickle may run code: convert it with "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), ...)"
)

_SHOWN = 20
_FUSED_QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


Factors = Mapping[str, Mapping[str, Tensor]]
"""Tensors of each layer, by its path in the model and by PEFT's name, as `lora_A.weight`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """What a LoRA file holds, every entry with its place in a pipeline.

    Attributes:
        layers: Entries by component prefix, as diffusers names them.
        factors: The same, without alphas, by prefix, layer and PEFT's name.
        norms: Whole values of norm weights, by parameter of the transformer.
        alphas: Scales that the file keeps beside the factors.
        metadata: PEFT's configuration from the file's header, if it has one.
    """

    layers: Mapping[str, dict[str, Tensor]]
    factors: Mapping[str, Factors]
    norms: Mapping[str, Tensor]
    alphas: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that loading would ignore, or that are the engine's own business.

    Raises:
        ValueError: The message names them.
    """
    for name, advice in (
        ("adapter_name", "pass it as name"),
        ("hotswap", "leave it out: no LoRA has anything compiled again"),
        ("lora_scale", "pass it as weight"),
    ):
        if name in arguments:
            raise ValueError(f"got {name}={checks.show(arguments[name])}; {advice}")
    checks.refuse_unknown(arguments, list(_READING), "load_lora")


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
    _refuse_whole_numbers(raw)
    converted, alphas = _convert(pipeline, raw)
    _refuse_dropped(raw, converted)
    _refuse_not_finite(converted)
    norm_keys = getattr(pipeline, "_control_lora_supported_norm_keys", ())
    norms, layers, strange = _sort(converted, norm_keys, targets)
    strange += [name for name in alphas or {} if name.partition(".")[0] not in targets]
    strange += _strange_norms(norms, targets[_PREFIX])
    factors: dict[str, Factors] = {}
    for prefix, state in layers.items():
        unknown, factors[prefix] = _check_layers(prefix, targets[prefix], state, alphas or {})
        strange += unknown
    if strange:
        shown = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
        raise UnsupportedModelError(
            f"the LoRA has {len(strange)} of {len(converted)} entries that have no place in this "
            f"pipeline ({shown}); take one that was made for this model, or leave these out"
        )
    if not any(layers.values()) and not norms:
        raise UnsupportedModelError(
            "the LoRA has no layer of this pipeline; take one that was made for this model"
        )
    return LoraFile(layers=layers, factors=factors, norms=norms, alphas=alphas, metadata=metadata)


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
    name = where["weight_name"]
    if where["use_safetensors"] is False or not str(name or _ENDING).endswith(_ENDING):
        raise ValueError(f"got {lora} as a pickle, weight_name={checks.show(name)}; {_NO_PICKLE}")
    try:
        found, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=lora,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            **{**where, "use_safetensors": True},
        )
    except SafetensorError as error:
        raise ValueError(f"{lora} is no {_ENDING} file ({error}); {_NO_PICKLE}") from error
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
    except (RuntimeError, TypeError) as error:
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


def _refuse_whole_numbers(raw: Mapping[str, Any]) -> None:
    """Refuses factors that are quantised, or no LoRA's; an alpha may be a whole number."""
    for name, value in raw.items():
        if isinstance(value, Tensor) and value.ndim and not value.is_floating_point():
            raise ValueError(
                f"the LoRA's {name} is {value.dtype}; expected numbers in floating point: take a "
                "plain LoRA"
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
        elif prefix == _PREFIX and _is_norm(name, norm_keys):
            norms[rest] = tensor
        else:
            layers[prefix][name] = tensor
    return norms, layers, strange


def _is_norm(name: str, norm_keys: Sequence[str]) -> bool:
    return not ("lora" in name or "lokr" in name) and any(key in name for key in norm_keys)


def _strange_norms(norms: Mapping[str, Tensor], transformer: nn.Module | None) -> list[str]:
    own = {} if transformer is None else dict(transformer.named_parameters())
    return [
        f"{_PREFIX}.{name}"
        for name, value in norms.items()
        if name not in own or own[name].shape != value.shape
    ]


def _check_layers(
    prefix: str, model: nn.Module | None, state: Mapping[str, Tensor], alphas: Mapping[str, Any]
) -> tuple[list[str], Factors]:
    """Entries of one component that belong to none of its layers, and the others by layer."""
    scales = [name for name in alphas if name.startswith(f"{prefix}.")]
    if not state:
        return scales, {}
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
        if not _is_whole(factors) or not _takes(layer, factors):
            strange += [f"{path}.{name}" for name in factors]
        else:
            _check_shape(f"{prefix}.{path}", layer, factors)
            _refuse_fused_projection(prefix, path, modules)
    cut = _cut(prefix, model)
    for name in scales:
        path = name.removeprefix(f"{prefix}.").removeprefix(cut).removesuffix(".alpha")
        if path not in found:
            strange.append(name)
    named = [name if name.startswith(f"{prefix}.") else f"{prefix}.{name}" for name in strange]
    return named, found


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
        first = next(iter(own))
        in_peft = "lora_A" in first or any(".lokr_" in name for name in own)
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
    entry = _LOKR if any(".lokr_" in name for name in state) else _LORA
    for name, tensor in state.items():
        match = entry.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    return strange, found


def _is_whole(factors: Mapping[str, Tensor]) -> bool:
    """Whether a layer has both of its factors, of LoRA or of LoKr."""
    if any(name.startswith("lora_") for name in factors):
        pair = [factors.get(f"lora_{one}.weight") for one in "AB"]
        return all(one is not None and one.ndim > 1 for one in pair)
    names = ("lokr_w1", "lokr_w2")
    return all(one in factors or {f"{one}_a", f"{one}_b"} <= factors.keys() for one in names)


def _takes(layer: nn.Module | None, factors: Mapping[str, Tensor]) -> TypeGuard[nn.Module]:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.groups == 1 and "lora_A.weight" in factors
    return isinstance(layer, nn.Linear)


def _check_shape(where: str, layer: nn.Module, factors: Mapping[str, Tensor]) -> None:
    weight = layer.get_parameter("weight")
    if "lora_A.weight" in factors:
        down, up = factors["lora_A.weight"], factors["lora_B.weight"]
        made: tuple[int, ...] = (*up.shape[:1], *down.shape[1:])
        ranks = (down.shape[0], up.shape[1:].numel())
    else:
        made, ranks = _kron_shape(factors)
    if made != tuple(weight.shape) or ranks[0] != ranks[1]:
        raise UnsupportedModelError(
            f"the LoRA is for a {where} of {list(made)} and rank {ranks[0]} or {ranks[1]}; "
            f"this one has {list(weight.shape)}, and a LoRA that widens layers (a control LoRA) is "
            "not taken: use one that was made for this model"
        )
    for name in ("lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight"):
        if name in factors and factors[name].numel() != weight.shape[0]:
            raise UnsupportedModelError(
                f"the LoRA has {factors[name].numel()} values in {where}.{name}, and the layer has "
                f"{weight.shape[0]} rows; use one that was made for this model"
            )
    if "lora_B.bias" in factors and getattr(layer, "bias", None) is None:
        raise UnsupportedModelError(
            f"the LoRA has a bias for {where}, which has none; use one that was made for this model"
        )


def _kron_shape(factors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Shape of LoKr's product, and the two ranks of a factor that is a product itself."""
    rows, columns, ranks = 1, 1, (0, 0)
    for name in ("lokr_w1", "lokr_w2"):
        whole = factors.get(name)
        left = factors[f"{name}_a"] if whole is None else whole
        right = factors[f"{name}_b"] if whole is None else whole
        if left.ndim != 2 or right.ndim != 2:
            return (), ranks
        rows, columns = rows * left.shape[0], columns * right.shape[1]
        if whole is None and ranks[0] == ranks[1]:
            ranks = (left.shape[1], right.shape[0])
    return (rows, columns), ranks


def _refuse_fused_projection(prefix: str, path: str, modules: Mapping[str, nn.Module]) -> None:
    parent, _, name = path.rpartition(".")
    if name in _FUSED_QKV and getattr(modules.get(parent), "fused_projections", False):
        raise UnsupportedModelError(
            f"the LoRA changes {prefix}.{path}, which is not read while projections are fused; "
            f"call {prefix}.unfuse_qkv_projections() before compiling"
        )
