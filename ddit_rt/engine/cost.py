"""What one denoising step must do at least: operations, and bytes of weights to read.

The model is copied onto the meta device, where tensors have shapes and no memory, and the step
runs there under a counter. So nothing here knows a family's formulas, and no weight is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ddit_rt.errors import ShapeError
from ddit_rt.models.base import BATCH, IMAGE, JOINT, SOUND, TEXT, BlockType
from ddit_rt.models.family import Family
from ddit_rt.models.quantised import stored_bytes
from ddit_rt.steps import StepModel
from ddit_rt.steps.bound import without_data


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """One step of the unmodified model on the tokens of one patch size.

    What is computed once per run (text tokens, time embedding, positions) is not in it, nor are
    scores and solver, which are bound by the latents' bytes, nor an adapter's own layers.

    Attributes:
        flops: Floating-point operations of matrix products and attention, over the whole batch;
            a multiply-add is two.
        weight_bytes: Weights that the step reads, each once.
        image_tokens: Image tokens per sample.
        text_tokens: Text tokens per sample.
    """

    flops: int
    weight_bytes: int
    image_tokens: int
    text_tokens: int


@torch.no_grad()
def step_cost(
    model: StepModel,
    *,
    height: int,
    width: int,
    multiple: int,
    batch: int,
    text_tokens: int,
    frames: int = 0,
    reused: bool = False,
) -> StepCost:
    """Counts one step of a bucket.

    Args:
        model: The model; its weights may be anywhere, the meta device included.
        height: Latent rows.
        width: Latent columns.
        multiple: Patch size as a multiple of p.
        batch: Samples, cond and uncond passes both counted.
        text_tokens: Text tokens per sample.
        frames: Latent frames; 0 for images.
        reused: Whether a residual stands for the blocks; it is not counted.

    Raises:
        ShapeError: The model's own patch size does not divide the latent.
    """
    patch = model.patch_size
    if min(height, width) < patch or height % patch or width % patch:
        raise ShapeError(
            f"got latents of {height} x {width}; patches of {patch} pixels do not divide them"
        )
    tokens = model.grid(height, width, multiple, frames).tokens
    sizes = {BATCH: batch, IMAGE: tokens, TEXT: text_tokens, JOINT: tokens + text_tokens}
    sizes[SOUND] = model.family.sound_tokens(model.transformer, frames)
    twin = _meta_copy(model.family, model.transformer)
    channels = model.family.latent_channels(twin)
    size = model.small_size(height, width, multiple)
    shape = (batch, channels, *((frames,) if frames else ()), *size)
    parts = [_ends(model.family, twin, shape, text_tokens)]
    # One of several variants of a block stands for all: they have the same weights.
    types = [kind for kind in model.family.block_types(twin) if not (kind.variant or reused)]
    parts += [_blocks(block_type, twin, sizes) for block_type in types]
    return StepCost(
        flops=sum(flops for flops, _ in parts),
        weight_bytes=sum(size for _, size in parts),
        image_tokens=tokens,
        text_tokens=text_tokens,
    )


def _ends(
    family: Family, twin: nn.Module, shape: tuple[int, ...], text_tokens: int
) -> tuple[int, int]:
    """What a step computes beside its blocks."""
    bound, arguments = without_data(family, twin, shape, text_tokens)
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    return _count(twin, lambda: bound(arguments, step, reuse=False))


def _blocks(block_type: BlockType, twin: nn.Module, sizes: dict[str, int]) -> tuple[int, int]:
    """All blocks of one type: they differ in their values only, so one stands for all."""
    block, *others = block_type.blocks(twin)
    inputs = [
        torch.empty(spec.shape(sizes), dtype=_float_or(spec.dtype), device="meta")
        for spec in block_type.inputs
    ]
    flops, size = _count(block, lambda: block_type.forward(block, *inputs))
    return flops * (1 + len(others)), size * (1 + len(others))


def _float_or(dtype: torch.dtype | None) -> torch.dtype:
    """Float32 for all that holds floating-point numbers, as the copy's weights."""
    return torch.float32 if dtype is None or dtype.is_floating_point else dtype


def _count(module: nn.Module, run: Callable[[], Any]) -> tuple[int, int]:
    """Operations of a call, and bytes of those tensors of the module that it reads."""
    reads = _Reads(module)
    with FlopCounterMode(display=False) as counter, reads:
        run()
    return counter.get_total_flops(), sum(reads.sizes.values())


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Notes which tensors of a module are read.

    Attributes:
        sizes: Bytes of each, by identity, in the dtype of the model that was copied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owned = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._owned:
                self.sizes[id(leaf)] = leaf.stored_bytes
        return func(*args, **(kwargs or {}))


def _meta_copy(family: Family, transformer: nn.Module) -> nn.Module:
    """A copy without memory, in which an empty module stands for all blocks but the first ones.

    All in float32: mixed dtypes change no count, but fail in a product.
    """
    memo: dict[int, nn.Module | Tensor] = {
        id(block): nn.Identity()
        for block_type in family.block_types(transformer)
        for block in block_type.blocks(transformer)[1:]
    }
    memo |= {id(parameter): _meta(parameter) for parameter in transformer.parameters()}
    memo |= {id(buffer): _meta(buffer) for buffer in transformer.buffers()}
    return copy.deepcopy(transformer, memo).eval()


def _meta(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    twin = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    twin.stored_bytes = stored_bytes(tensor)  # type: ignore[attr-defined]
    return twin
