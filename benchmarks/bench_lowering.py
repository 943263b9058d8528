"""Counts what FLUX's and Wan's blocks become on an H100, without one.

    python benchmarks/bench_lowering.py [--out FILE] [--blocks NAME ...] [--fp8] [--keep FOLDER]

Exports the blocks of FLUX.1-dev and Wan 2.1 1.3B on tensors without data, lowers them as
`ddit_rt.compile` does, and reads the packages: which kernels a block launches, how many
instructions each has, how wide it loads, and which matrix products and attention it calls. Needs a
CUDA build of torch, `CUDA_HOME`, and a `libcuda.so` in `LIBRARY_PATH` to link with (the toolkit's
stub does). Packages that are kept run on such a GPU, untuned: `bench_real_size.py --lowered`.

The record has `blocks`, with `--fp8` (torchao) instead `fp8`, and `before`, made once: of
diffusers' own forward. What is not made anew stays.
"""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # what pretends must be in this process

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from real_models import MODELS
from records import RESULTS, parser_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import ddit_rt.blocks.template as template
from ddit_rt.blocks import TokenRanges, inductor
from ddit_rt.blocks.compile import export_block
from ddit_rt.blocks.fused import fuse_layers
from ddit_rt.blocks.linears import linear_calls
from ddit_rt.blocks.package import PackageInfo, input_dtypes, package_path
from ddit_rt.blocks.runner import constant_specs
from ddit_rt.lab.measure.report import versions, write_json
from ddit_rt.models import family_of
from ddit_rt.models.base import BlockType
from ddit_rt.models.layered import LayeredFamily
from ddit_rt.models.quantised import quantise

PRESETS = {
    "flux": ("flux-dev", FluxTransformer2DModel),
    "wan": ("wan-1.3b", WanTransformer3DModel),
}
_LAYERS = ("num_layers", "num_single_layers")
_LAUNCH = re.compile(r"^    call_(\w+)\(", re.MULTILINE)
_CALL = re.compile(r"aoti_torch_cuda_(\w+)\(")
_VIEWS = ("view_dtype", "reinterpret", "copy_")
_COMPUTES = re.compile(r"_(add|mul|sub|mean|pow|rsqrt|silu|gelu|layer_norm|div|tanh|exp)(_|$)")


def main(argv: Sequence[str] | None = None) -> int:
    """Lowers the blocks and writes the record."""
    parser = parser_of(__doc__, RESULTS / "lowered_cuda.json")
    parser.add_argument("--blocks", nargs="+", help="classes; default: all")
    parser.add_argument("--keep", type=Path, help="a folder for the packages")
    parser.add_argument("--fp8", action="store_true", help="the blocks in fp8")
    args = parser.parse_args(argv)
    if torch.version.cuda is None:
        parser.error(f"torch {torch.__version__} generates no code for CUDA; install a CUDA build")
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as name:
        exported = list(exports(args.blocks, fp8=args.fp8))
        packages = lower(exported, Path(name))
        blocks = {info.block: counted(path) for path, info in packages}
        for path, info in packages if args.keep else ():
            kept = args.keep / package_path(info.block, None)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    section = "fp8" if args.fp8 else "blocks"
    report = {"schema_version": 1, **before, "versions": versions()}
    write_json(args.out, {**report, section: {**before.get(section, {}), **blocks}})
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def exports(
    wanted: Sequence[str] | None, *, fp8: bool = False
) -> Iterator[tuple[Any, PackageInfo]]:
    """Exported blocks, one of each class, with what their packages say of themselves."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for name, (preset, transformer_class) in PRESETS.items():
        full = MODELS[name].presets[preset].config
        config = {**full, **{name: 1 for name in _LAYERS if name in full}}
        with torch.device("meta"):
            shapes = transformer_class(**config).to(torch.bfloat16).requires_grad_(False)
        # Tensors without data are of a class of their own, which a user's model may not have.
        with mode, mock.patch.object(template, "check_plain"), torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            try:
                transformer = transformer_class(**config).eval().requires_grad_(False)
            finally:
                torch.set_default_dtype(torch.float32)
            family = family_of(transformer)
            assert isinstance(family, LayeredFamily)
            ranges = TokenRanges(**family.default_ranges)
            for block_type in family.block_types(transformer):
                if wanted and block_type.name not in wanted:
                    continue
                own, like = (block_type.blocks(model)[0] for model in (transformer, shapes))
                if fp8:
                    _quantise(block_type, own, like)
                block = template.BlockTemplate(block_type, own)
                with unset_fake_temporarily():  # what reads what is found by running a copy on meta
                    fused = fuse_layers(block, block_type, like)
                info = PackageInfo(
                    block=block_type.name,
                    inputs=block_type.inputs,
                    input_dtypes=input_dtypes(block_type.inputs, torch.bfloat16),
                    device="cuda",
                    ranges=ranges,
                    constants=constant_specs(block),
                    fused=fused,
                )
                program = export_block(block, info, torch.device("cuda", 0))
                _call_cudnn(program)
                yield program, info


def _quantise(block_type: BlockType, own: nn.Module, like: nn.Module) -> None:
    """What `quantise_blocks` does; torchao looks for a device, which is not there yet."""
    from torchao.quantization import quant_api

    with unset_fake_temporarily():
        paths = [call.path for call in linear_calls(block_type, like) if call.of_tokens]
    found = (own.get_submodule(path) for path in dict.fromkeys(paths))
    with mock.patch.object(quant_api, "_check_hardware_support"):
        quantise([layer for layer in found if isinstance(layer, nn.Linear)], "fp8")


def _call_cudnn(program: Any) -> None:
    """Asks for cuDNN's attention, which `compile` finds on a real device and not on this one."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    graph = program.graph_module.graph
    for node in [one for one in graph.nodes if one.target is attention]:
        with graph.inserting_before(node):
            call = torch.ops.aten._scaled_dot_product_cudnn_attention.default  # noqa: SLF001
            fused = graph.call_function(call, (*node.args[:3], None, False))
            first = graph.call_function(operator.getitem, (fused, 0))
        values = [one.meta["val"] for one in node.args[:3]]
        fused.meta["val"], first.meta["val"] = call(*values, None, False), node.meta["val"]
        node.replace_all_uses_with(first)
        graph.erase_node(node)
    program.graph_module.recompile()


def lower(exported: Sequence[tuple[Any, PackageInfo]], folder: Path) -> list[Any]:
    """Packages of exported blocks. From here on, this process believes in a device."""
    import fake_cuda

    fake_cuda.pretend()
    packages = []
    for program, info in exported:
        mode = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"].fake_mode
        with mode:
            for tensors in (program._state_dict, program._constants):  # noqa: SLF001
                for name, tensor in tensors.items():
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = (
                        torch.nn.Parameter(empty, requires_grad=False) if is_weight else empty
                    )
        path = folder / f"{info.block}.pt2"
        with torch.no_grad():
            inductor.compile_program(program, info, path, {"cpp.vec_isa_ok": False})
        packages.append((path, info))
    return packages


def counted(package: Path) -> dict[str, Any]:
    """What a package launches and calls."""
    with zipfile.ZipFile(package) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    source = "\n".join(
        content.decode() for name, content in contents.items() if name.endswith("wrapper.cpp")
    )
    launches = Counter(_LAUNCH.findall(source))
    calls = Counter(call for call in _CALL.findall(source) if call not in _VIEWS)
    code = dict(_disassembled(content) for n, content in contents.items() if n.endswith(".cubin"))
    return {
        "launches": launches.total(),
        "kernels": {n: {**code.get(n, {}), "launches": launches[n]} for n in sorted(launches)},
        "calls": dict(sorted(calls.items())),
        "gelu_in_product": calls["_addmm_activation"],
        "copies": sorted(name for name in launches if not _COMPUTES.search(name)),
    }


def _disassembled(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Name of a kernel, its instructions, and how many of them load 16 bits."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "nvdisasm"), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name = re.search(r"\.text\.(\w+)", text)
    assert name is not None, "a cubin holds a kernel"
    return name[1], {
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", text, re.MULTILINE)),
        "loads_16_bit": len(re.findall(r"LDG\S*\.U16", text)),
    }


if __name__ == "__main__":
    sys.exit(main())
