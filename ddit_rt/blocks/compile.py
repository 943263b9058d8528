"""Regional ahead-of-time compilation: one package per block type, for every size and bucket.

A transformer repeats few block classes many times, so one block of each is exported and compiled
with AOTInductor. Batch, image and text counts stay open (`TokenRanges`); weights stay outside the
package and are the user's own at run time. All patch sizes whose blocks carry LoRA share one
package with different constants.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ddit_rt.blocks.constants import live_slots
from ddit_rt.blocks.fused import fuse_layers
from ddit_rt.blocks.inductor import torch_as_tested
from ddit_rt.blocks.inputs import SYMBOLS, TokenRanges
from ddit_rt.blocks.machine import compiler_ready
from ddit_rt.blocks.package import PackageInfo, input_dtypes, package_path
from ddit_rt.blocks.quantise import check_rows
from ddit_rt.blocks.runner import constant_specs
from ddit_rt.blocks.side_by_side import SideBySide, failures_of
from ddit_rt.blocks.template import BlockTemplate, LoraSpec
from ddit_rt.errors import CompileError, UnsupportedModelError
from ddit_rt.models.base import BATCH, IMAGE, JOINT, SOUND, TEXT, BlockType, TensorSpec

LOG = logging.getLogger("ddit_rt.blocks")

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, label)`, first with `done = 0`."""

# Preferred sizes of the example that is traced. On CUDA kernels are tuned on it, so it is an image
# of 1024 x 1024; on a CPU nothing is, and a small one costs less.
_EXAMPLES: Mapping[str, Mapping[str, int]] = {
    "cpu": {BATCH: 2, IMAGE: 22, TEXT: 13, SOUND: 9},
    "cuda": {BATCH: 2, IMAGE: 4096, TEXT: 512, SOUND: 126},
}


def compile_blocks(
    transformer: nn.Module,
    block_types: Sequence[BlockType],
    directory: Path,
    *,
    ranges: TokenRanges,
    variants: Mapping[str | None, LoraSpec | None],
    progress: Progress | None = None,
) -> list[str]:
    """Compiles every block type in every variant.

    Args:
        transformer: The user's model; left as it is.
        block_types: The model's repeated blocks.
        directory: Folder that the packages go to.
        ranges: Sizes to compile for.
        variants: LoRA branch of each variant; `{None: None}` for the plain blocks only.
        progress: Told before the first and after each package.

    Returns:
        Paths of the packages, relative to `directory`, as `package_path` names them.

    Raises:
        CompileError: A block cannot be exported or compiled.
        UnsupportedModelError: Blocks of one type differ, or carry adapters or hooks.
    """
    for block_type in block_types:
        check_identical(block_type, block_type.blocks(transformer))
    first = block_types[0].blocks(transformer)[0]
    with compiler_ready(next(first.parameters()).device.type):
        pass  # what the machine lacks is said before the time that tracing takes
    jobs = {
        package_path(block_type.name, variant): (block_type, lora)
        for variant, lora in variants.items()
        for block_type in block_types
    }
    left = dict.fromkeys(jobs)

    def tell() -> None:
        if progress is not None:
            progress(len(jobs) - len(left), len(jobs), next(iter(left), "done"))

    def done(package: Path) -> None:
        left.pop(package.relative_to(directory).as_posix())
        tell()

    tell()
    with SideBySide(len(jobs), done) as compiler:
        for path, (block_type, lora) in jobs.items():
            block = block_type.blocks(transformer)[0]
            program, info = traced(block_type, block, ranges, lora)
            compiler.add(program, info, directory / path)
        compiler.finish()
    return list(jobs)


def traced(
    block_type: BlockType, block: nn.Module, ranges: TokenRanges, lora: LoraSpec | None = None
) -> tuple[ExportedProgram, PackageInfo]:
    """A block as a program, and what its package is to say of itself.

    Args:
        block_type: How the block is called.
        block: Any block of that type; left as it is.
        ranges: Sizes to compile for.
        lora: Branch that the variant carries in its feed-forward layers.

    Raises:
        CompileError: The block cannot be exported.
        UnsupportedModelError: The block carries adapters or hooks.
    """
    device = next(block.parameters()).device
    if device.type == "cuda":
        check_rows(block_type, block)
    template = BlockTemplate(block_type, block, lora)
    started = time.perf_counter()
    with failures_of(block_type.name), torch_as_tested():
        fused = fuse_layers(template, block_type, block)
        info = PackageInfo(
            block=block_type.name,
            inputs=block_type.inputs,
            input_dtypes=input_dtypes(block_type.inputs, block_type.dtype(block)),
            device=device.type,
            ranges=ranges,
            constants=constant_specs(template),
            fused=fused,
        )
        program = export_block(template, info, device)
    LOG.debug("%s: traced in %.1f s", block_type.name, time.perf_counter() - started)
    return program, info


def check_identical(block_type: BlockType, blocks: Sequence[nn.Module]) -> None:
    """Raises `UnsupportedModelError` unless all blocks have the same tensors.

    One package serves all blocks of a type, so names, shapes and data types must agree.
    """
    if not blocks:
        raise UnsupportedModelError(f"{block_type.path} holds no {block_type.name}")
    reference, first = _signature(blocks[0]), block_type.block_path(0)
    for index, block in enumerate(blocks[1:], start=1):
        for name, found in _signature(block).items() ^ reference.items():
            raise UnsupportedModelError(
                f"{block_type.block_path(index)} differs from {first} in {name} ({found}): "
                "one package serves all blocks of a type, so all must have equal tensors"
            )


def export_block(
    template: BlockTemplate, info: PackageInfo, device: torch.device
) -> ExportedProgram:
    """Traces a block with open batch, image and text counts.

    Args:
        template: The block behind the flat convention.
        info: Inputs and ranges of the block.
        device: Device of the block.
    """
    sizes = _example_sizes(info.ranges, _EXAMPLES[info.device])
    example = tuple(
        torch.zeros(spec.shape(sizes), dtype=dtype, device=device)
        for spec, dtype in zip(info.inputs, info.input_dtypes, strict=True)
    )
    shapes = tuple(_open_dims(spec, info.ranges) for spec in info.inputs)
    with torch.no_grad():
        program = torch.export.export(template, example, dynamic_shapes=(shapes,), strict=False)
    lifted = [name for name in program.constants if name not in program.state_dict]
    if lifted:
        raise CompileError(
            f"{info.block} creates tensors in its forward ({', '.join(lifted)}): make them "
            "buffers, so that they have a name to be found by"
        )
    return program


def _example_sizes(ranges: TokenRanges, preferred: Mapping[str, int]) -> dict[str, int]:
    """Sizes in range, none of them 1 and all different: the tracer takes equal sizes for one."""
    choices = []
    for symbol in SYMBOLS:
        low, high = _traced_range(ranges, symbol)
        wanted = preferred[symbol]
        near = range(max(low, 2), min(high, max(low, wanted) + 4) + 1)
        choices.append(sorted(near, key=lambda size: abs(size - wanted)))
    for batch, image, text, sound in itertools.product(*choices):
        if len({batch, image, text, image + text, sound}) == 5:
            return {BATCH: batch, IMAGE: image, TEXT: text, JOINT: image + text, SOUND: sound}
    raise AssertionError(ranges)


def _traced_range(ranges: TokenRanges, symbol: str) -> tuple[int, int]:
    """At least three sizes, whatever is asked for: fewer would be traced as a fixed one."""
    if symbol == JOINT:
        image, text = _traced_range(ranges, IMAGE), _traced_range(ranges, TEXT)
        return image[0] + text[0], image[1] + text[1]
    low, high = ranges.of(symbol)
    return low, max(high, low + 2, 4)


def _open_dims(spec: TensorSpec, ranges: TokenRanges) -> dict[int, Any]:
    """Symbolic dimensions of one input; the tracer finds out by itself which ones are equal."""
    dims = {}
    for axis, symbol in enumerate(spec.dims):
        if isinstance(symbol, str):
            low, high = _traced_range(ranges, symbol)
            dims[axis] = Dim.DYNAMIC(min=low, max=high)
    return dims


def _signature(block: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    tensors = {name: slot.read() for name, slot in live_slots(block).items()}
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if t is not None}
