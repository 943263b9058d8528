"""What the linear layers of a block read, by a run without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddit_rt.blocks.package import input_dtypes
from ddit_rt.blocks.template import BlockTemplate
from ddit_rt.models.base import BATCH, IMAGE, JOINT, SOUND, TEXT, BlockType
from ddit_rt.models.quantised import ExposedLinear

_SIZES = {BATCH: 2, IMAGE: 24, TEXT: 16, JOINT: 40, SOUND: 20}


@dataclass(frozen=True, eq=False, slots=True)
class LinearCall:
    """One call of a linear layer.

    Attributes:
        path: The layer inside the block.
        values: What it read, on the meta device: layers that read the same have the same object.
    """

    path: str
    values: Tensor

    @property
    def of_tokens(self) -> bool:
        """Whether it read tokens, not one row a sample as what makes the modulation does."""
        return self.values.numel() // self.values.shape[-1] > _SIZES[BATCH]


def linear_calls(block_type: BlockType, block: nn.Module) -> list[LinearCall]:
    """Calls of a block's linear layers, quantised ones among them, in order.

    Args:
        block_type: How the block is called.
        block: Any block of that type; left as it is.
    """
    template = BlockTemplate(block_type, block).to("meta")
    calls: list[LinearCall] = []
    for path, layer in template.block.named_modules():
        if isinstance(layer, (nn.Linear, ExposedLinear)):

            def note(layer: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                del layer
                calls.append(LinearCall(path, args[0]))

            layer.register_forward_pre_hook(note)
    dtypes = input_dtypes(block_type.inputs, block_type.dtype(block))
    inputs = [
        torch.empty(spec.shape(_SIZES), dtype=dtype, device="meta")
        for spec, dtype in zip(block_type.inputs, dtypes, strict=True)
    ]
    with torch.no_grad():
        template(*inputs)
    return calls
