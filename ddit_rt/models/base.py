"""Records by which families, blocks and steps speak of a model: blocks, tokens, guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

BATCH = "batch"
IMAGE = "image"
TEXT = "text"
JOINT = "image+text"
SOUND = "sound"


class Runner(Protocol):
    """A block ready to run."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Flat tensors in the order of `BlockType.inputs`, a tuple of tensors out."""
        ...

    def stale(self) -> bool:
        """Whether the model has moved the weights that this runner reads."""
        ...

    def rebind(self) -> None:
        """Reads the weights from where the model holds them now."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name and shape of one block input.

    Attributes:
        name: The block's own argument name.
        dims: One entry per dimension: a fixed size, or one of the symbols `BATCH`, `IMAGE`
            (image tokens), `TEXT` (text tokens), `JOINT` (their sum) and `SOUND` (tokens of a
            soundtrack that advances with the video).
        dtype: Its data type; None for that of the block's weights with a batch dimension, and
            float32 without.
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: torch.dtype | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for given symbol sizes."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockType:
    """One repeated block class of a transformer: the unit that is compiled ahead of time.

    Attributes:
        name: Class name of the block, e.g. `FluxTransformerBlock`.
        path: Attribute of the transformer that holds the `nn.ModuleList` of these blocks.
        inputs: The flat tensor inputs, in order.
        outputs: Number of tensors returned.
        forward: Calls a block of this type on the flat inputs.
        feed_forward: Names of the linear layers, inside the block, that an adapter's LoRA targets;
            empty in a family without adapters.
        variant: What sets it apart from another type of the same blocks, such as an input more.
        members: Places in the list of the blocks of this type; None for all.
    """

    name: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: int
    forward: Callable[..., tuple[Tensor, ...]]
    feed_forward: tuple[str, ...]
    variant: str = ""
    members: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """By which its runners are found: path or first block, and the variant if there is one."""
        path = self.block_path(0) if self.members else self.path
        return f"{path}:{self.variant}" if self.variant else path

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's own blocks of this type, in order."""
        return [
            block
            for place, block in enumerate(transformer.get_submodule(self.path).children())
            if self.members is None or place in self.members
        ]

    def block_path(self, index: int) -> str:
        """Path of the block that stands at an index among those of this type."""
        return f"{self.path}.{self.members[index] if self.members else index}"

    def dtype(self, block: nn.Module) -> torch.dtype:
        """Dtype of a block's matrix products; norms and tables may be kept in float32."""
        return max(block.parameters(), key=Tensor.numel).dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Tokens of one patch size over one latent.

    Attributes:
        height: Token rows.
        width: Token columns.
        frames: Latent frames (1 for images).
    """

    height: int
    width: int
    frames: int = 1

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.frames * self.height * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Classifier-free guidance: v = v_negative + scale (v_prompt - v_negative).

    Attributes:
        prompt: Conditioning of the pass with the prompt.
        negative: The same for the pass with the negative prompt.
        scale: `[]`, or `[E]` with one for each expert, float32, on the model's device.
    """

    prompt: Mapping[str, Any]
    negative: Mapping[str, Any]
    scale: Tensor
