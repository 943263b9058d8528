"""One block behind the flat calling convention, and the names by which its tensors are found.

Blocks of one type differ in their weights only, so one of them stands for all: it is what gets
exported, and what `EagerRunner` executes with another block's tensors. The template never
touches the model it comes from: it is a copy of the module tree whose parameters share the
original storage.

Names: a tensor is known by its name inside the block as the unmodified model spells it
(`ff.net.0.proj.weight`). PEFT inserts `base_layer` into that name when a LoRA is added; storage
and meaning stay, so `canonical_name` takes it out again. The tensors of an adapter are known as
`ff.net.0.proj.lora_A.weight` and `ff.net.0.proj.lora_B.weight`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.models.base import BlockType
from ddit_rt.models.plain import check_plain
from ddit_rt.models.processors import set_processors
from ddit_rt.models.quantised import expose_weights
from ddit_rt.models.structure import base_of

_PREFIX = "block."
_LORA = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """The low-rank branch that a block variant carries in its feed-forward layers.

    Attributes:
        rank: Rank r of the two factors.
        scaling: Factor on the branch, PEFT's `lora_alpha / r`; it is part of the compiled graph.
    """

    rank: int
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank: got {self.rank}, expected 1 or more")

    @property
    def variant(self) -> str:
        """Name of the package variant, e.g. `lora32`, or `lora32x0.5` for another scaling."""
        return f"lora{self.rank}" if self.scaling == 1 else f"lora{self.rank}x{self.scaling:g}"


def canonical_name(name: str) -> str:
    """A tensor's name inside its block, free of wrapper, `base_layer` and adapter name."""
    name = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    return _LORA.sub(r".\1.weight", name)


def is_lora_name(name: str) -> bool:
    """Whether a canonical name is that of an adapter's factor."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


class BlockTemplate(nn.Module):
    """A copy of one block that takes and returns flat tensors.

    Outputs are contiguous: the next package reads its inputs as dense memory.

    Attributes:
        block: The copy, in evaluation mode, with LoRA layers where the variant asks for them.
    """

    def __init__(
        self, block_type: BlockType, block: nn.Module, lora: LoraSpec | None = None
    ) -> None:
        """Copies the block; see `copy_block` for what is shared.

        Args:
            block_type: How the block is called.
            block: A block of a user's transformer, left as it is.
            lora: The branch to add, if any.

        Raises:
            UnsupportedModelError: The block carries PEFT layers or hooks.
        """
        super().__init__()
        check_plain(block, block_type.name)
        self.block = copy_block(block)
        expose_weights(self.block)
        set_processors(self.block)
        self._forward_block = block_type.forward
        if lora is not None:
            _inject(self.block, block_type, lora)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the block on the inputs of its `BlockType`, in order."""
        return tuple(out.contiguous() for out in self._forward_block(self.block, *tensors))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers with the names that the exported program gives them."""
        yield from self.named_parameters()
        yield from self.named_buffers()


def copy_block(block: nn.Module) -> nn.Module:
    """A new module tree over the same storage: no weight is copied, no attribute is shared.

    PEFT's layers are left out; `check_plain` has told that they change nothing.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in block.parameters()
    }
    memo |= {id(buffer): buffer.detach() for buffer in block.buffers()}
    return _without_adapters(copy.deepcopy(block, memo)).eval()


def _without_adapters(module: nn.Module) -> nn.Module:
    """PEFT's layers, where fused or idle, give way to those that they wrap."""
    for name, child in list(module.named_children()):
        setattr(module, name, _without_adapters(base_of(child)))
    return module


def _inject(block: nn.Module, block_type: BlockType, lora: LoraSpec) -> None:
    """Adds PEFT LoRA layers to a template, with zero factors of the block's own type."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank * lora.scaling,
        target_modules=list(block_type.feed_forward),
    )
    weights = {name: block.get_parameter(f"{name}.weight") for name in block_type.feed_forward}
    inject_adapter_in_model(config, block, low_cpu_mem_usage=True)
    for name, weight in weights.items():
        layer = block.get_submodule(name)
        for factors in (layer.lora_A, layer.lora_B):
            _materialize(factors, weight)
    adapted = {name for name, module in block.named_modules() if hasattr(module, "base_layer")}
    assert adapted == set(block_type.feed_forward), adapted


def _materialize(factors: Any, like: Tensor) -> None:
    for factor in factors.values():
        zeros = torch.zeros(factor.weight.shape, dtype=like.dtype, device=like.device)
        factor.weight = nn.Parameter(zeros, requires_grad=False)
