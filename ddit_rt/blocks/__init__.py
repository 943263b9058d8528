"""One block of a model: exported, compiled, packed, and run on the live weights."""

from ddit_rt.blocks.compile import Progress, check_identical, compile_blocks
from ddit_rt.blocks.inputs import InputCheck, TokenRanges
from ddit_rt.blocks.lora import block_lora
from ddit_rt.blocks.package import PackageInfo, package_path, read_info
from ddit_rt.blocks.quantise import quantise_blocks
from ddit_rt.blocks.runner import CompiledRunner, EagerRunner, LoadedPackage, load_runner
from ddit_rt.blocks.template import BlockTemplate, LoraSpec

__all__ = [
    "BlockTemplate",
    "CompiledRunner",
    "EagerRunner",
    "InputCheck",
    "LoadedPackage",
    "LoraSpec",
    "PackageInfo",
    "Progress",
    "TokenRanges",
    "block_lora",
    "check_identical",
    "compile_blocks",
    "load_runner",
    "package_path",
    "quantise_blocks",
    "read_info",
]
