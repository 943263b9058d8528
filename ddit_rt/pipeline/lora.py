"""Style LoRAs: fused into the weights that the compiled blocks read, and taken out again.

The compiled blocks hold no weights of their own, so a LoRA that is fused in place acts at once,
at every patch size, with nothing compiled again. Taking it out restores the very bits that were
there before: subtracting in floating point would not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError

_ADAPTER_NAME = "ddit_rt_style"
_SECOND = "load_into_transformer_2"
"""Argument of `load_lora_weights` by which a LoRA is for the second expert of a Wan pipeline."""


def lora_component(load_arguments: Mapping[str, Any]) -> str:
    """The pipeline's attribute that a LoRA is for."""
    return "transformer_2" if load_arguments.get(_SECOND) else "transformer"


class FusedLora:
    """A LoRA that is fused into a pipeline's transformer, and what was there before."""

    def __init__(self, pipeline: Any, lora: Any, scale: float, **load_arguments: Any) -> None:
        """Loads and fuses; on any error the weights are as they were.

        Args:
            pipeline: The diffusers pipeline.
            lora: What its `load_lora_weights` takes: a path, a Hub name or a state dict.
            scale: Strength.
            load_arguments: Passed on, e.g. `weight_name`, or `load_into_transformer_2`.

        Raises:
            UnsupportedModelError: The pipeline has LoRA layers already, or the LoRA has none for
                the transformer.
        """
        component = lora_component(load_arguments)
        self._transformer: nn.Module = getattr(pipeline, component)
        self._before: dict[str, Tensor] = {}
        if getattr(self._transformer, "_hf_peft_config_loaded", False):
            raise UnsupportedModelError(
                "the pipeline has LoRA layers loaded already, which this would unload; call "
                "pipeline.unload_lora_weights() first"
            )
        pipeline.load_lora_weights(lora, adapter_name=_ADAPTER_NAME, **load_arguments)
        try:
            self._before = _snapshot(self._transformer)
            pipeline.fuse_lora(
                components=[component], lora_scale=scale, adapter_names=[_ADAPTER_NAME]
            )
        except BaseException:
            self.restore()
            raise
        finally:
            # Leaves the fused weights, under their plain names, without PEFT's layers.
            pipeline.unload_lora_weights()

    def restore(self) -> None:
        """Puts the weights back, bit for bit."""
        for name, value in self._before.items():
            _weight(self._transformer, name).copy_(value)


def refuse_unfused_lora(transformer: nn.Module) -> None:
    """Raises when LoRA layers are active but not fused: the compiled blocks would ignore them."""
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            waiting = set(module.active_adapters) - set(module.merged_adapters)
            if waiting:
                raise UnsupportedModelError(
                    f"LoRA {sorted(waiting)} is loaded but not fused (first at {name}), and the "
                    "compiled blocks would ignore it; call engine.fuse_lora(...) or "
                    "pipeline.fuse_lora(), or unload it with pipeline.unload_lora_weights()"
                )


def _snapshot(transformer: nn.Module) -> dict[str, Tensor]:
    """Copies of the base weights of every layer that a LoRA is about to change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    copies: dict[str, Tensor] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            for parameter, value in module.get_base_layer().named_parameters():
                copies[f"{name}.{parameter}"] = value.detach().clone()
    if not copies:
        raise UnsupportedModelError(
            "the LoRA has no layer in the transformer; there is nothing to fuse"
        )
    return copies


def _weight(transformer: nn.Module, name: str) -> Tensor:
    path, _, parameter = name.rpartition(".")
    module = transformer.get_submodule(path)
    # While PEFT's layer is there, the weight lies one level deeper.
    layer = getattr(module, "base_layer", module)
    value = getattr(layer, parameter)
    assert isinstance(value, Tensor)
    return value.detach()
