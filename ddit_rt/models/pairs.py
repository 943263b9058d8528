"""Complex arithmetic on pairs of real numbers, which compilers fuse and complex tensors stop.

Some models rotate queries and keys as complex numbers. Inductor generates no code for those: it
falls back to one call per operation. Within `RealPairs`, what a model views as complex is a
`Pairs` instead, the same storage with its operations written out, to the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Pairs:
    """Stands for the complex tensor that `torch.view_as_complex(pairs)` would be.

    Attributes:
        pairs: Real and imaginary parts, `[..., 2]`.
    """

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = pairs

    @property
    def shape(self) -> torch.Size:
        """Of the complex tensor."""
        return self.pairs.shape[:-1]

    @property
    def ndim(self) -> int:
        """Of the complex tensor."""
        return self.pairs.ndim - 1

    @property
    def device(self) -> torch.device:
        """Of both parts."""
        return self.pairs.device

    def to(self, device: torch.device) -> Pairs:
        """On another device."""
        return Pairs(self.pairs.to(device))

    def unsqueeze(self, dim: int) -> Pairs:
        """As of the complex tensor."""
        return Pairs(self.pairs.unsqueeze(dim if dim >= 0 else dim - 1))

    def __getitem__(self, index: Any) -> Pairs:
        index = index if isinstance(index, tuple) else (index,)
        assert Ellipsis not in index, "not of an index from behind"
        return Pairs(self.pairs[index])

    def __mul__(self, other: Pairs) -> Pairs:
        (a, b), (c, d) = self.pairs.unbind(-1), other.pairs.unbind(-1)
        return Pairs(torch.stack((a * c - b * d, a * d + b * c), dim=-1))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only the way back is a function of torch."""
        if func is torch.view_as_real:
            return args[0].pairs
        return NotImplemented


class RealPairs(TorchFunctionMode):
    """Within it, `torch.view_as_complex` gives `Pairs`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.view_as_complex:
            return Pairs(args[0])
        return func(*args, **(kwargs or {}))
