"""One matrix product for layers of a block that read the same tensor, such as to_q, to_k, to_v.

Only a template is changed: its first layer of such a group holds the rows of all of them as one
weight, and each takes its own columns of the one product. The live model keeps its layers; their
weights are put one behind the other in one storage when a package is bound (`constants.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit_rt.blocks.constants import FUSED, FusedLayers
from ddit_rt.blocks.linears import linear_calls
from ddit_rt.blocks.template import BlockTemplate
from ddit_rt.models.base import BlockType

_ALIGNMENT = 64
"""Bytes. Every weight of a group begins where one in storage of its own could."""


def fuse_layers(template: BlockTemplate, block_type: BlockType, block: nn.Module) -> FusedLayers:
    """Makes one product of those of a template's layers that read the same tokens.

    Layers of other widths stay apart: on CUDA what a block's feed-forward reads ends in GELU, and
    that is part of its product (`rewrites.end_products_in_gelu`).

    Args:
        template: A template of the block; changed.
        block_type: How the block is called.
        block: Any block of that type; left as it is.

    Returns:
        Paths of the layers of each group, in the order of their rows.
    """
    groups = _groups(template, block_type, block)
    for group in groups:
        wide = _Wide([template.block.get_submodule(path) for path in group])
        for place, path in enumerate(group):
            template.block.set_submodule(path, _Member(wide, place))
    return groups


def _groups(template: BlockTemplate, block_type: BlockType, block: nn.Module) -> FusedLayers:
    calls = linear_calls(block_type, block)
    times = Counter(call.path for call in calls)
    found: dict[object, list[str]] = {}
    for call in calls:
        layer = template.block.get_submodule(call.path)
        # Quantised layers and those with LoRA beside them are of other classes.
        if type(layer) is nn.Linear and call.of_tokens and times[call.path] == 1:
            held = list(layer.parameters())
            if not any(one.nbytes % _ALIGNMENT for one in held):
                kind = tuple((one.shape, one.dtype) for one in held)
                found.setdefault((id(call.values), kind), []).append(call.path)
    return tuple(tuple(group) for group in found.values() if len(group) > 1)


class _Wide(nn.Module):
    """The rows of several layers as one weight."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(layers)
        for name in ("weight", "bias"):
            rows = [getattr(layer, name) for layer in layers]
            whole = None if rows[0] is None else nn.Parameter(torch.cat(rows), requires_grad=False)
            self.register_parameter(name, whole)
        self._last = _Last()

    def forward(self, values: Tensor) -> Tensor:
        """The products of all layers side by side, computed for the first that asks."""
        if self._last.values is not values:
            product = F.linear(values, self.weight, self.bias)
            self._last.values, self._last.product = values, product
        return self._last.product


class _Last:
    """What was computed last; not an attribute of the module, which tracing would object to."""

    values: Tensor | None = None
    product: Tensor


class _Member(nn.Module):
    """In the place of one of the layers."""

    def __init__(self, wide: _Wide, place: int) -> None:
        super().__init__()
        self._wide, self._place = (wide,), place  # a tuple is no child: the first has it as one
        if place == 0:
            self.add_module(FUSED, wide)

    def forward(self, values: Tensor) -> Tensor:
        """Its own part of the product."""
        return self._own(self._wide[0](values), dim=-1)

    def words(self, values: Tensor) -> Tensor:
        """The same as 32-bit words, of a product in 16 bits: see `models/processors.py`."""
        return self._own(self._wide[0](values).view(torch.int32), dim=-1)

    def _own(self, whole: Tensor, dim: int) -> Tensor:
        return whole.chunk(self._wide[0].count, dim)[self._place]

    @property
    def weight(self) -> Tensor:
        """Its own rows, for code that looks at them."""
        return self._own(self._wide[0].weight, dim=0)
