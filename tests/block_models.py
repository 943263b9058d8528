"""Inputs and adapters of FLUX blocks, for tests."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddit_rt.blocks import LoraSpec, PackageInfo, TokenRanges, package_path
from ddit_rt.blocks.compile import traced
from ddit_rt.blocks.package import METADATA_KEY, input_dtypes
from ddit_rt.blocks.side_by_side import compile_package
from ddit_rt.models.base import BATCH, IMAGE, JOINT, TEXT, BlockType


@dataclass(frozen=True)
class CompiledBlocks:
    """Packages of the tiny FLUX model, plain and with LoRA of rank 4."""

    directory: Path
    lora: LoraSpec

    def package(self, block: str, *, lora: bool = False) -> Path:
        return self.directory / package_path(block, self.lora.variant if lora else None)


def archive(path: Path, info: PackageInfo, **sources: str) -> Path:
    """A file that is built like a package."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/wrapper_metadata.json", json.dumps({METADATA_KEY: info.to_json()}))
        for name, text in sources.items():
            file.writestr(f"x/{name}.cpp", text)
    return path


def compile_block(
    block_type: BlockType,
    block: nn.Module,
    *,
    package: Path,
    ranges: TokenRanges,
    lora: LoraSpec | None = None,
) -> PackageInfo:
    """One package, compiled in this process."""
    program, info = traced(block_type, block, ranges, lora)
    return compile_package(program, info, package)


def block_inputs(
    block_type: BlockType,
    batch: int,
    image: int,
    text: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """Random inputs; the rotary tables are a true cosine and sine."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {BATCH: batch, IMAGE: image, TEXT: text, JOINT: image + text}
    dtypes = input_dtypes(block_type.inputs, dtype)
    tensors = {
        spec.name: torch.randn(spec.shape(sizes), generator=generator).to(kind)
        for spec, kind in zip(block_type.inputs, dtypes, strict=True)
    }
    angle = tensors["rotary_cos"]
    tensors["rotary_cos"], tensors["rotary_sin"] = angle.cos(), angle.sin()
    return list(tensors.values())


def eager(block_type: BlockType, block: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """What PyTorch makes of a block."""
    with torch.no_grad():
        return block_type.forward(block, *inputs)


def random_lora(
    block_type: BlockType, block: nn.Module, spec: LoraSpec, seed: int = 0
) -> dict[str, Tensor]:
    """Factors of an adapter for one block, both far from zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in block_type.feed_forward:
        weight = block.get_parameter(f"{name}.weight")
        shapes = {"A": (spec.rank, weight.shape[1]), "B": (weight.shape[0], spec.rank)}
        for side, shape in shapes.items():
            value = torch.randn(shape, generator=generator) * 0.2
            factors[f"{name}.lora_{side}.weight"] = value.to(weight.dtype)
    return factors
