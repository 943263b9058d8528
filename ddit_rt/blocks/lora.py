"""An adapter's LoRA tensors, as PEFT stores them, to the constants of one block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ddit_rt.blocks.template import canonical_name, is_lora_name
from ddit_rt.errors import ArtifactMismatchError

_PREFIXES = ("base_model.model.", "transformer.")


def block_lora(state: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    """The factors that belong to one block, under the names that a runner takes.

    Args:
        state: PEFT state dict, e.g. of `adapter_model.safetensors`: names such as
            `transformer_blocks.0.ff.net.2.lora_A.weight`, with or without `base_model.model.`
            or `transformer.` in front and an adapter name behind `lora_A`. A is `[r, in]`,
            B is `[out, r]`.
        block: The block inside the transformer, e.g. `transformer_blocks.0`.

    Returns:
        The same tensors as `ff.net.2.lora_A.weight` and so on. Whether they are complete and fit
        is checked when a runner is bound.

    Raises:
        ArtifactMismatchError: The block has entries that are no LoRA factors, or lacks any.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inside = _plain(name)
        if inside.startswith(f"{block}."):
            found[canonical_name(inside.removeprefix(f"{block}."))] = tensor
    strange = sorted(name for name in found if not is_lora_name(name))
    if strange:
        raise ArtifactMismatchError(
            f"the adapter has {strange[:3]} for {block}; compiled blocks take the weights of plain "
            "LoRA only (lora_A, lora_B): train or convert it without biases, DoRA and alpha entries"
        )
    if not found:
        raise ArtifactMismatchError(
            f"the adapter has nothing for {block} (it has {sorted(state)[:3]}, ...): it was made "
            "for another model"
        )
    return found


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
