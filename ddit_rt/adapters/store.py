"""Adapters on disk: one folder per patch size, in PEFT's own format and names.

    adapter/
      2p/adapter_config.json          PEFT's configuration of the LoRA part
      2p/adapter_model.safetensors    its weights, as `PeftModel.save_pretrained` names them
      2p/patch_adapter.safetensors    embedding, de-embedding, identifier, residual
      4p/...

The LoRA part of a folder loads in plain PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddit_rt import checks, notices
from ddit_rt.adapters.adapter import AdapterConfig, AdapterSet, PatchAdapter, adaptable_layers
from ddit_rt.errors import ArtifactError, ArtifactMismatchError
from ddit_rt.models.family import Family
from ddit_rt.policies import patch_name

_PATCH_FILE = "patch_adapter.safetensors"
_LORA_FILE = "adapter_model.safetensors"
_LORA_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_METADATA = "ddit_rt_adapter"
_BASE_SAMPLES = 8
_SMALL_IMAGE = "dct"
"""How `steps/buckets.py` makes the small image that `snr` corrects; files that name none are of a
version that averaged."""


def lora_config(family: Family, transformer: nn.Module, config: AdapterConfig) -> LoraConfig:
    """PEFT's configuration of an adapter's LoRA: the feed-forward layers of every block."""
    targets = _lora_targets(family, transformer)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        bias="none",
        inference_mode=True,
    )
    # PEFT has made a set of them, and would write it in another order in every process.
    lora.target_modules = targets
    return lora


def _lora_targets(family: Family, transformer: nn.Module) -> list[str]:
    """Names of the layers that an adapter's LoRA changes, in the order in which they run."""
    return [
        f"{block_type.path}.{index}.{layer}"
        for block_type in family.block_types(transformer)
        for index in range(len(block_type.blocks(transformer)))
        for layer in block_type.feed_forward
    ]


def save_adapters(
    adapters: AdapterSet,
    folder: str | Path,
    family: Family,
    transformer: nn.Module,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes every adapter of a set under `folder`, one sub-folder per patch size.

    Args:
        adapters: The adapters.
        folder: Made if need be.
        family: The transformer's family.
        transformer: The base model that they are for.
        dtype: To store in; by default as they are.
    """
    for multiple, adapter in adapters.adapters.items():
        target = Path(folder) / patch_name(multiple)
        target.mkdir(parents=True, exist_ok=True)
        config = adapter.config
        metadata = {
            "patch": config.patch,
            "rank": config.rank,
            "lora_alpha": config.lora_alpha,
            "variant": config.variant,
            "family": family.name,
            "transformer_class": family.transformer_class,
            "base": _base_sample(family, transformer),
            "small_image": _SMALL_IMAGE,
        }
        tensors = {
            name: value.to(dtype or value.dtype).contiguous()
            for name, value in adapter.state_dict().items()
        }
        save_file(tensors, target / _PATCH_FILE, {_METADATA: json.dumps(metadata)})
        if adapter.lora:
            lora_config(family, transformer, config).save_pretrained(str(target))
            named = {
                _PEFT_PREFIX + name: value.to(dtype or value.dtype).contiguous()
                for name, value in adapter.lora.items()
            }
            save_file(named, target / _LORA_FILE, {"format": "pt"})


def load_adapters(
    folder: str | Path, family: Family, transformer: nn.Module, *, check_base: bool = True
) -> AdapterSet:
    """Reads the adapters under `folder` for a transformer.

    Args:
        folder: What `save_adapters` wrote, or one of its sub-folders.
        family: The transformer's family.
        transformer: The base model that they were trained for.
        check_base: Whether a model of the same shapes with other weights is refused. The
            embedding and de-embedding tell models apart: a style LoRA leaves them as they are.

    Raises:
        ArtifactError: No adapter there, or a broken file.
        ArtifactMismatchError: Made for another model class, other weights, another width or rank;
            both are shown.

    Warns:
        UserWarning: One of the variant `snr` was trained on small images of an earlier version.
    """
    root = Path(folder)
    if not root.exists():
        raise ArtifactError(f"no such file: {root}; give the folder that holds the adapters")
    files = sorted(root.glob(f"*/{_PATCH_FILE}")) or sorted(root.glob(_PATCH_FILE))
    if not files:
        raise ArtifactError(
            f"{root} holds no adapter: expected <patch size>/{_PATCH_FILE}, such as "
            f"2p/{_PATCH_FILE}"
        )
    loaded = [_load_one(file.parent, family, transformer, check_base) for file in files]
    return AdapterSet(adapters={adapter.config.multiple: adapter for adapter in loaded})


def _base_sample(family: Family, transformer: nn.Module) -> list[float]:
    """Some weights of the embedding and de-embedding, by which a base model is known again."""
    values: list[float] = []
    for layer in adaptable_layers(family, transformer):
        flat = layer.weight.detach().flatten()
        places = torch.linspace(
            0, flat.numel() - 1, _BASE_SAMPLES, dtype=torch.float64, device="cpu"
        ).long()
        values += flat[places.to(flat.device)].float().tolist()
    return values


def _check_base(
    folder: Path, made_for: list[float], family: Family, transformer: nn.Module
) -> None:
    found = _base_sample(family, transformer)
    # Two parts in a hundred: the same weights rounded to bfloat16 are still the same model.
    here, there = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (found, made_for))
    alike = len(here) == len(there) and torch.isclose(here, there, rtol=0.02, atol=1e-5).all()
    if not alike:
        raise ArtifactMismatchError(
            f"the adapter in {folder} was made for a base model whose embedding weights begin "
            f"{_rounded(made_for)}; this model's begin {_rounded(found)}. Load the model that it "
            "was trained for, or train one for this model"
        )


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values[:4]]


def _load_one(
    folder: Path, family: Family, transformer: nn.Module, check_base: bool
) -> PatchAdapter:
    tensors, metadata = _read(folder / _PATCH_FILE)
    if _METADATA not in metadata:
        raise ArtifactError(f"{folder / _PATCH_FILE} was not written by save_adapters: no metadata")
    fields = _fields(folder, metadata[_METADATA])
    made_for = fields.pop("transformer_class", None)
    if made_for != family.transformer_class:
        raise ArtifactMismatchError(
            f"the adapter in {folder} was made for {checks.show(made_for)}; this model is a "
            f"{family.transformer_class}"
        )
    base, small_image = fields.pop("base", None), fields.pop("small_image", "mean")
    try:
        config = AdapterConfig(**fields)
        _check_room(config, tensors)
        adapter = PatchAdapter.from_base(config, family, transformer)
    except (TypeError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    _check_shapes(folder, tensors, adapter.state_dict())
    if base is not None and check_base:
        _check_base(folder, base, family, transformer)
    if adapter.config.variant == "snr" and small_image != _SMALL_IMAGE:
        notices.warn(
            f"the adapter in {folder} was trained on small images by {small_image!r}, and coarse "
            f"steps now make them by {_SMALL_IMAGE!r}: it can be worse than none; train it again"
        )
    adapter.load_state_dict(tensors)
    if (folder / _LORA_FILE).exists():
        lora, _ = _read(folder / _LORA_FILE)
        adapter.lora = _checked_lora(folder, lora, family, transformer, adapter.config)
    return adapter.requires_grad_(False)


def _fields(folder: Path, text: str) -> dict[str, Any]:
    """What an adapter says about itself, without the family, which its model's class tells."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _damaged(folder, f"expected an object, got {type(fields).__name__}")
    fields.pop("family", None)
    base = fields.get("base")
    if base is not None and not (
        isinstance(base, list) and all(isinstance(one, (int, float)) for one in base)
    ):
        raise _damaged(folder, "the sample of its base model is no list of numbers")
    return fields


def _check_room(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuses sizes that none of the tensors has, before as much memory is asked for."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if max(config.rank, config.multiple**2) > largest:
        raise ValueError(f"rank {config.rank} at {config.patch} is beyond its largest tensor")


def _damaged(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"the metadata of the adapter in {folder} cannot be read ({why}): copy it again, or train "
        "it again"
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path} ({error}); it is missing or broken") from error


def _check_shapes(
    folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for name, value in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != value.shape:
            came = "missing" if found is None else list(found.shape)
            raise ArtifactMismatchError(
                f"the adapter in {folder} does not fit this model: {name} is {came}, the model "
                f"needs {list(value.shape)}"
            )


def _checked_lora(
    folder: Path,
    lora: Mapping[str, Tensor],
    family: Family,
    transformer: nn.Module,
    config: AdapterConfig,
) -> dict[str, Tensor]:
    """LoRA tensors without PEFT's prefix, in the model's dtype, complete and of the right shape."""
    named = {name.removeprefix(_PEFT_PREFIX): value for name, value in lora.items()}
    weight = adaptable_layers(family, transformer)[0].weight
    checked: dict[str, Tensor] = {}
    for target in _lora_targets(family, transformer):
        linear = transformer.get_submodule(target)
        assert isinstance(linear, nn.Linear)
        shapes = {
            f"{target}.lora_A.weight": (config.rank, linear.in_features),
            f"{target}.lora_B.weight": (linear.out_features, config.rank),
        }
        for name, shape in shapes.items():
            value = named.pop(name, None)
            if value is None or tuple(value.shape) != shape:
                came = "missing" if value is None else list(value.shape)
                raise ArtifactMismatchError(
                    f"the adapter in {folder} does not fit this model: {name} is {came}, rank "
                    f"{config.rank} on this layer needs {list(shape)}"
                )
            checked[name] = value.to(weight.device, weight.dtype)
    if named:
        raise ArtifactMismatchError(
            f"the adapter in {folder} holds layers that this model lacks: {sorted(named)[:3]}"
        )
    return checked


def untrained_lora(
    family: Family, transformer: nn.Module, config: AdapterConfig, seed: int = 0
) -> dict[str, Tensor]:
    """LoRA tensors as PEFT initialises them: A random, B zero, so that they change nothing."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for target in _lora_targets(family, transformer):
        linear = transformer.get_submodule(target)
        assert isinstance(linear, nn.Linear)
        down = torch.empty(config.rank, linear.in_features, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
        tensors[f"{target}.lora_A.weight"] = down.to(linear.weight)
        tensors[f"{target}.lora_B.weight"] = linear.weight.new_zeros(
            linear.out_features, config.rank
        )
    return tensors
