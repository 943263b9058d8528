"""Regional ahead-of-time compilation: one package per block type, for every size and bucket.

A transformer repeats few block classes many times, so one block of each is exported and compiled
with AOTInductor. Batch, image and text counts stay open (`TokenRanges`); weights stay outside the
package and are the user's own at run time. All patch sizes whose blocks carry LoRA share one
package with different constants.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ddit_rt.blocks.constants import live_slots
from ddit_rt.blocks.fused import fuse_layers
from ddit_rt.blocks.inductor import compile_program, torch_as_tested
from ddit_rt.blocks.inputs import SYMBOLS, TokenRanges
from ddit_rt.blocks.machine import compiler_ready
from ddit_rt.blocks.package import PackageInfo, package_path, record_attention
from ddit_rt.blocks.package import input_dtypes as resolve_dtypes
from ddit_rt.blocks.quantise import check_rows
from ddit_rt.blocks.runner import constant_specs
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
    input_dtypes: Mapping[str, torch.dtype] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Compiles every block type in every variant.

    Args:
        transformer: The user's model; left as it is.
        block_types: The model's repeated blocks.
        directory: Folder that the packages go to.
        ranges: Sizes to compile for.
        variants: LoRA branch of each variant; `{None: None}` for the plain blocks only.
        input_dtypes: As for `compile_block`.
        progress: Told before the first and after each package.

    Returns:
        Paths of the packages, relative to `directory`, as `package_path` names them.

    Raises:
        CompileError: A block cannot be exported or compiled.
        UnsupportedModelError: Blocks of one type differ, or carry adapters or hooks.
    """
    for block_type in block_types:
        check_identical(block_type, block_type.blocks(transformer))
    jobs = [(block_type, variant) for variant in variants for block_type in block_types]
    paths: list[str] = []
    known: dict[str, Path] = {}
    for block_type, variant in jobs:
        path = package_path(block_type.name, variant)
        if progress is not None:
            progress(len(paths), len(jobs), path)
        compile_block(
            block_type,
            block_type.blocks(transformer)[0],
            package=directory / path,
            ranges=ranges,
            lora=variants[variant],
            input_dtypes=input_dtypes,
            known=known,
        )
        paths.append(path)
    if progress is not None:
        progress(len(paths), len(jobs), "done")
    return paths


def compile_block(
    block_type: BlockType,
    block: nn.Module,
    *,
    package: Path,
    ranges: TokenRanges,
    lora: LoraSpec | None = None,
    input_dtypes: Mapping[str, torch.dtype] | None = None,
    known: dict[str, Path] | None = None,
) -> PackageInfo:
    """Compiles one block into a package, for the device and data type it has.

    Args:
        block_type: How the block is called.
        block: Any block of that type; left as it is.
        package: The `.pt2` file to write; appears only when complete.
        ranges: Sizes to compile for.
        lora: Branch that the variant carries in its feed-forward layers.
        input_dtypes: Data types of inputs, by name, that differ from `package.input_dtypes`.
        known: Packages so far, by their programs; an equal one is copied, a new one is added.

    Raises:
        CompileError: The block cannot be exported or compiled.
        UnsupportedModelError: The block carries adapters or hooks.
    """
    weight = next(block.parameters())
    if weight.device.type == "cuda":
        check_rows(block_type, block)
    template = BlockTemplate(block_type, block, lora)
    started = time.perf_counter()
    try:
        with (
            torch_as_tested(),
            compiler_ready(weight.device.type) as options,
            _replacing(package) as temporary,
        ):
            fused = fuse_layers(template, block_type, block)
            info = PackageInfo(
                block=block_type.name,
                inputs=block_type.inputs,
                input_dtypes=resolve_dtypes(
                    block_type.inputs, block_type.dtype(block), input_dtypes
                ),
                device=weight.device.type,
                ranges=ranges,
                constants=constant_specs(template),
                fused=fused,
            )
            program = export_block(template, info, weight.device)
            LOG.debug("%s: exported after %.2f s", block_type.name, time.perf_counter() - started)
            same = {} if known is None else known
            made = same.setdefault(_identity(program, info), package)
            if made != package:
                shutil.copyfile(made, temporary)
                LOG.info("%s: the program of %s", package.parent.name, made.parent.name)
                return record_attention(temporary, info)
            info = compile_program(program, info, temporary, options)
            LOG.info("%s: compiled in %.1f s", package.parent.name, time.perf_counter() - started)
            return info
    except CompileError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise CompileError(
            f"{block_type.name} cannot be compiled ahead of time: {reason}"
        ) from error


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


def _identity(program: ExportedProgram, info: PackageInfo) -> str:
    """All that a package hangs on but for its name: it holds no weights."""
    return f"{program}\n{replace(info, block='').to_json()}"


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


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` on success and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
