"""Teacher and student in one frozen model: LoRA switched off, or on for one patch size.

The base weights exist once. PEFT puts the LoRA of every size beside the feed-forward layers, as the
adapters "2p", "4p", and each block is told, right where it runs, which of them is on: so gradient
checkpointing computes it again as it was, and all sizes fit into one backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddit_rt.adapters import AdapterConfig, AdapterSet, PatchAdapter, lora_config
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.lab.train.velocities import States, coarse_velocity, squared_error, taught
from ddit_rt.models import Family
from ddit_rt.models.base import BlockType
from ddit_rt.policies import patch_name
from ddit_rt.steps import Runners, StepModel

T = TypeVar("T")


class TrainingBlock:
    """A block of the model with the LoRA of one size, or with none. Differentiable."""

    def __init__(
        self, block_type: BlockType, block: nn.Module, adapter: str | None, checkpointing: bool
    ) -> None:
        self._forward = block_type.forward
        self._block = block
        self._adapter = adapter
        self._checkpointing = checkpointing
        self._layers = [layer for layer in block.modules() if isinstance(layer, BaseTunerLayer)]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See `Runner`."""
        if self._checkpointing and torch.is_grad_enabled():
            result: tuple[Tensor, ...] = checkpoint(self._run, *tensors, use_reentrant=False)
            return result
        return self._run(*tensors)

    def _run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for layer in self._layers:
            _switch(layer, self._adapter)
        return self._forward(self._block, *tensors)

    def stale(self) -> bool:
        """Never: the block itself is run."""
        return False

    def rebind(self) -> None:
        """Nothing to do."""


def _switch(layer: BaseTunerLayer, adapter: str | None) -> None:
    if adapter is None:
        layer.enable_adapters(False)
    elif layer.disable_adapters or layer.active_adapters != [adapter]:
        layer.enable_adapters(True)
        layer.set_adapter(adapter)
    # PEFT freezes what is switched off, and autograd would then drop its gradient.
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)


class Student(nn.Module):
    """A frozen transformer with trainable adapters.

    Attributes:
        family: The transformer's family.
        transformer: The model itself; `unload` gives it back as it was.
        adapters: Adapters by the name of their patch size, float32.
    """

    def __init__(
        self,
        family: Family,
        transformer: nn.Module,
        configs: tuple[AdapterConfig, ...],
        *,
        seed: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
            raise UnsupportedModelError(
                "the transformer carries adapters that are not fused; adapters are trained for "
                "plain weights: unload them, or fuse them first"
            )
        self.family = family
        self.transformer = transformer
        self._trainable = {n for n, p in transformer.named_parameters() if p.requires_grad}
        transformer.requires_grad_(False)
        # A run must not depend on, nor change, what the caller drew before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapters = nn.ModuleDict(
                {c.patch: PatchAdapter.from_base(c, family, transformer).float() for c in configs}
            )
            for config in configs:
                lora = lora_config(family, transformer, config)
                lora.inference_mode = False
                inject_adapter_in_model(lora, transformer, adapter_name=config.patch)
                # Of no use here, and PEFT would take a second size for a mistake.
                vars(transformer).pop("peft_config", None)
        self.model = StepModel(
            family=family, transformer=transformer, base=self._blocks(None, checkpointing=False)
        )
        self._runners = {
            config.multiple: self._blocks(config.patch, checkpointing=checkpointing)
            for config in configs
        }
        for layer in transformer.modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            layer.enable_adapters(False)
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
                    parameter.requires_grad_(True)

    @property
    def multiples(self) -> tuple[int, ...]:
        """Patch sizes that are trained."""
        return tuple(self._runners)

    def adapter(self, multiple: int) -> PatchAdapter:
        """The adapter of a patch size."""
        adapter = self.adapters[patch_name(multiple)]
        assert isinstance(adapter, PatchAdapter)
        return adapter

    def runners(self, multiple: int) -> Runners:
        """Blocks with the LoRA of a patch size."""
        return self._runners[multiple]

    def forward(self, run: Callable[..., T], *arguments: Any) -> T:
        """`run(self, *arguments)`: what uses weights goes through here, where FSDP gathers them."""
        return run(self, *arguments)

    def errors(self, states: States) -> dict[int, Tensor]:
        """Squared error of v against the teacher, by multiple of p, each `[B]`."""
        states = taught(self.model, states)
        assert states.velocity is not None
        return {
            multiple: squared_error(
                coarse_velocity(self.model, states, multiple, self.adapter(multiple), runners),
                states.velocity,
            )
            for multiple, runners in self._runners.items()
        }

    def export(self, state: Mapping[str, Tensor]) -> AdapterSet:
        """Copies of the adapters, with their LoRA, for `save_adapters` and the runtime.

        Args:
            state: The whole state dict of this module.
        """
        adapters = {}
        for multiple in self.multiples:
            name, trained = patch_name(multiple), self.adapter(multiple)
            adapter = copy.deepcopy(trained)
            prefix, tag = f"adapters.{name}.", f".{name}.weight"
            adapter.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
            adapter.lora = {
                k.removeprefix("transformer.").removesuffix(tag) + ".weight": v.detach().clone()
                for k, v in state.items()
                if ".lora_" in k and k.endswith(tag)
            }
            adapters[multiple] = adapter.requires_grad_(False)
        return AdapterSet(adapters=adapters)

    def unload(self) -> None:
        """Takes LoRA out of the transformer again; its weights were never changed."""
        for parent in list(self.transformer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(name in self._trainable)

    def _blocks(self, adapter: str | None, *, checkpointing: bool) -> Runners:
        return {
            block_type.path: [
                TrainingBlock(block_type, block, adapter, checkpointing)
                for block in block_type.blocks(self.transformer)
            ]
            for block_type in self.family.block_types(self.transformer)
        }
