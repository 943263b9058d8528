"""Which sizes a compiled block accepts, and the check that stands before every run.

A package reads its inputs as raw memory: a wrong sequence length, data type or stride is not
noticed there. `InputCheck` is therefore called before each run; a shape that passed once costs
one set lookup afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddit_rt import checks
from ddit_rt.errors import ShapeError
from ddit_rt.models.base import BATCH, IMAGE, JOINT, SOUND, TEXT, TensorSpec

SYMBOLS = (BATCH, IMAGE, TEXT, SOUND)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRanges:
    """Smallest and largest size, inclusive, of every dimension that a package leaves open.

    The defaults keep the largest intermediate of a 3072-wide single block (15360 features per
    token) below 2**31 elements, so that CUDA kernels may index with 32 bits.

    Attributes:
        batch: Prompts in one run, cond and uncond passes both counted.
        image: Image tokens.
        text: Text tokens.
        sound: Tokens of a soundtrack; of no meaning to models without one.
    """

    batch: tuple[int, int] = (1, 8)
    image: tuple[int, int] = (4, 16384)
    text: tuple[int, int] = (1, 512)
    sound: tuple[int, int] = (1, 1024)

    def __post_init__(self) -> None:
        expected = "(smallest, largest), two whole numbers"
        for symbol in SYMBOLS:
            low, high = checks.pair(symbol, getattr(self, symbol), checks.whole, expected)
            checks.settle(self, **{symbol: (low, high)})
            if not 1 <= low <= high:
                raise ShapeError(
                    f"range of {symbol}: got {low}..{high}, expected 1 <= smallest <= largest"
                )

    def of(self, symbol: str) -> tuple[int, int]:
        """Smallest and largest size of one of the symbols of `TensorSpec.dims`."""
        if symbol == JOINT:
            return self.image[0] + self.text[0], self.image[1] + self.text[1]
        bounds = {BATCH: self.batch, IMAGE: self.image, TEXT: self.text, SOUND: self.sound}
        return bounds[symbol]

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises `ShapeError` for a size outside its range.

        Args:
            sizes: Size of some or all of the symbols of `TensorSpec.dims`.
        """
        for symbol, size in sizes.items():
            low, high = self.of(symbol)
            if not low <= size <= high:
                raise ShapeError(
                    f"{symbol} is {size}, but the artifact was compiled for {low}..{high}: "
                    "choose a size in that range, or compile again with a wider one"
                )


class InputCheck:
    """Checks the flat inputs of a block: count, rank, sizes, data type, device and layout."""

    def __init__(
        self,
        block: str,
        inputs: Sequence[TensorSpec],
        ranges: TokenRanges,
        dtypes: Sequence[torch.dtype],
        device: torch.device,
    ) -> None:
        """Prepares the check.

        Args:
            block: Name of the block type, for messages.
            inputs: Names and shapes of the inputs.
            ranges: Sizes that the block was compiled for.
            dtypes: Data type of each input.
            device: Device of all inputs.
        """
        assert len(inputs) == len(dtypes)
        self._block = block
        self._inputs = tuple(inputs)
        self._ranges = ranges
        self._dtypes = tuple(dtypes)
        self._device = device
        self._accepted: set[tuple[torch.Size, ...]] = set()

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Raises `ShapeError` unless a block can run on these tensors."""
        shapes = tuple([tensor.shape for tensor in tensors])
        if shapes not in self._accepted:
            self._check_shapes(shapes)
            self._accepted.add(shapes)
        device = self._device
        for tensor, dtype in zip(tensors, self._dtypes, strict=True):
            if tensor.dtype is not dtype or tensor.device != device or not tensor.is_contiguous():
                self._explain(tensors)

    def _check_shapes(self, shapes: tuple[torch.Size, ...]) -> None:
        if len(shapes) != len(self._inputs):
            raise ShapeError(
                f"{self._block} takes {len(self._inputs)} tensors "
                f"({', '.join(spec.name for spec in self._inputs)}), got {len(shapes)}"
            )
        sizes: dict[str, int] = {}
        for spec, shape in zip(self._inputs, shapes, strict=True):
            self._match(spec, shape, sizes)
        if sizes.keys() >= {IMAGE, TEXT}:
            self._agree(sizes.setdefault(JOINT, sizes[IMAGE] + sizes[TEXT]), sizes)
        self._ranges.check({s: sizes[s] for s in (*SYMBOLS, JOINT) if s in sizes})

    def _match(self, spec: TensorSpec, shape: torch.Size, sizes: dict[str, int]) -> None:
        if len(shape) != len(spec.dims):
            raise ShapeError(
                f"{self._block}.{spec.name}: expected {_show(spec)}, got {tuple(shape)}"
            )
        for dim, size in zip(spec.dims, shape, strict=True):
            expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != expected:
                raise ShapeError(
                    f"{self._block}.{spec.name}: expected {_show(spec)} with {dim} = {expected}, "
                    f"got {tuple(shape)}"
                )

    def _agree(self, joint: int, sizes: Mapping[str, int]) -> None:
        if joint != sizes[IMAGE] + sizes[TEXT]:
            raise ShapeError(
                f"{self._block}: {joint} positions for {sizes[IMAGE]} image + {sizes[TEXT]} text "
                f"tokens, expected {sizes[IMAGE] + sizes[TEXT]}"
            )

    def _explain(self, tensors: Sequence[Tensor]) -> None:
        for spec, tensor, dtype in zip(self._inputs, tensors, self._dtypes, strict=True):
            name = f"{self._block}.{spec.name}"
            if tensor.dtype is not dtype:
                raise ShapeError(f"{name}: the block was compiled for {dtype}, got {tensor.dtype}")
            if tensor.device != self._device:
                raise ShapeError(
                    f"{name}: expected a tensor on {self._device}, got {tensor.device}"
                )
            if not tensor.is_contiguous():
                raise ShapeError(
                    f"{name}: expected a contiguous tensor, got strides {tensor.stride()} for "
                    f"shape {tuple(tensor.shape)}: pass .contiguous()"
                )


def _show(spec: TensorSpec) -> str:
    return "(" + ", ".join(str(dim) for dim in spec.dims) + ")"
