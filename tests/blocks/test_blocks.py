from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from block_models import CompiledBlocks, archive, block_inputs, compile_block, eager
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from qwen_models import tiny_transformer

from ddit_rt.blocks import (
    BlockTemplate,
    LoraSpec,
    PackageInfo,
    TokenRanges,
    check_identical,
    compile_blocks,
    load_runner,
    read_info,
)
from ddit_rt.blocks.compile import export_block
from ddit_rt.blocks.package import record_attention
from ddit_rt.errors import CompileError, UnsupportedModelError
from ddit_rt.models import family_of
from ddit_rt.models.base import BlockType


@pytest.fixture
def single(transformer: FluxTransformer2DModel) -> BlockType:
    return family_of(transformer).block_types(transformer)[1]


@pytest.mark.slow
def test_compile_blocks_reports_progress_and_compiles_equal_programs_once(
    transformer: FluxTransformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three block types, one variant: told before the first package and after each."""
    compiled: list[str] = []

    def compile_program(_: Any, info: PackageInfo, target: Path, __: Any) -> PackageInfo:
        compiled.append(info.block)
        return record_attention(archive(target, info), info)

    monkeypatch.setattr("ddit_rt.blocks.side_by_side.compile_program", compile_program)
    double, single = family_of(transformer).block_types(transformer)
    again = replace(single, name="Another")
    progress: list[tuple[int, int, str]] = []
    paths = compile_blocks(
        transformer,
        (double, single, again),
        tmp_path,
        ranges=TokenRanges(),
        variants={None: None},
        progress=lambda done, total, label: progress.append((done, total, label)),
    )
    assert [(done, total) for done, total, _ in progress] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert progress[0][2] == "FluxTransformerBlock/package.pt2"
    assert compiled == [double.name, single.name]
    infos = [read_info(tmp_path / path) for path in paths]
    assert [info.block for info in infos] == [double.name, single.name, again.name]
    assert infos[2] == replace(infos[1], block=again.name)


def test_compile_block_package_holds_no_weights(compiled_blocks: CompiledBlocks) -> None:
    names = [p for p in compiled_blocks.directory.rglob("*.pt2") if p.stat().st_size > 4 * 2**20]
    assert names == []


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_compile_block_half_precision(
    transformer: FluxTransformer2DModel,
    single: BlockType,
    tmp_path: Path,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    # The compiled block keeps fused intermediates in float32, eager rounds each of them: against
    # float32 truth the package has to be at least as close as eager, and both within a few
    # roundings of values near 2.
    truth_block = transformer.single_transformer_blocks[0]
    inputs = block_inputs(single, 2, 16, 5, dtype=dtype)
    truth = eager(single, truth_block.to(dtype).float(), [x.float() for x in inputs])
    block = truth_block.to(dtype)
    rounded = eager(single, block, inputs)
    package = tmp_path / "package.pt2"
    compile_block(single, block, package=package, ranges=TokenRanges())
    outputs = load_runner(package, block)(*inputs)
    for output, half, exact in zip(outputs, rounded, truth, strict=True):
        assert output.dtype is dtype
        error = (output.float() - exact).abs().mean()
        assert error <= (half.float() - exact).abs().mean() * 1.1
        assert error <= exact.abs().mean() * tolerance


def test_compile_block_leaves_the_model_alone(
    transformer: FluxTransformer2DModel, single: BlockType, tmp_path: Path, failing: str
) -> None:
    block = transformer.single_transformer_blocks[0].train().requires_grad_(True)
    names = [name for name, _ in block.named_modules()]
    state = torch.get_rng_state()
    with pytest.raises(CompileError, match=failing):
        compile_block(
            single,
            block,
            package=tmp_path / "p.pt2",
            ranges=TokenRanges(),
            lora=LoraSpec(rank=2),
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in block.named_modules()] == names
    assert block.training
    assert all(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize(
    ("ranges", "device"),
    [
        (TokenRanges(), "cuda"),
        (TokenRanges(batch=(1, 1), image=(1, 1), text=(1, 2)), "cpu"),
        (TokenRanges(batch=(2, 8), image=(64, 4096), text=(64, 512)), "cuda"),
        (TokenRanges(batch=(4, 4), image=(64, 64), text=(4, 64)), "cpu"),
    ],
)
def test_export_block_keeps_dimensions_apart(
    transformer: FluxTransformer2DModel, ranges: TokenRanges, device: str
) -> None:
    """With the example of either device; tracing computes nothing, so that the CPU can do it."""
    double = family_of(transformer).block_types(transformer)[0]
    template = BlockTemplate(double, transformer.transformer_blocks[0])
    info = PackageInfo(
        block=double.name,
        inputs=double.inputs,
        input_dtypes=(torch.float32,) * 5,
        device=device,
        ranges=ranges,
        constants={},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export_block(template, info, torch.device("cpu"))
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"][-5:]
    hidden, text, temb, cosine, sine = (node.meta["val"].shape for node in nodes)
    symbols = {str(hidden[0]), str(hidden[1]), str(text[1])}
    assert len(symbols) == 3
    assert not any(symbol.isdigit() for symbol in symbols)
    assert text[0] == temb[0] == hidden[0]
    assert cosine[0] == sine[0] == hidden[1] + text[1]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> str:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    return "FluxSingleTransformerBlock cannot be compiled ahead of time: out of luck"


def test_compile_block_without_compiler(
    transformer: FluxTransformer2DModel,
    single: BlockType,
    tmp_path: Path,
) -> None:
    compiler = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-g++")})
    with compiler, pytest.raises(CompileError, match="install g\\+\\+"):
        compile_block(
            single,
            transformer.single_transformer_blocks[0],
            package=tmp_path / "out" / "p.pt2",
            ranges=TokenRanges(),
        )
    assert not (tmp_path / "out").exists()


def test_compile_block_interrupted_leaves_nothing(
    transformer: FluxTransformer2DModel,
    single: BlockType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any, package_path: str, **__: Any) -> None:
        Path(package_path).write_bytes(b"half a package")
        raise KeyboardInterrupt

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", interrupt)
    (tmp_path / "p.pt2").write_bytes(b"the old one")
    with pytest.raises(KeyboardInterrupt):
        compile_block(
            single,
            transformer.single_transformer_blocks[0],
            package=tmp_path / "p.pt2",
            ranges=TokenRanges(),
        )
    assert [path.name for path in tmp_path.glob("*.pt2")] == ["p.pt2"]
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert (tmp_path / "p.pt2").read_bytes() == b"the old one"


def test_check_identical_other_shape(
    transformer: FluxTransformer2DModel, single: BlockType
) -> None:
    blocks = single.blocks(transformer)
    check_identical(single, blocks)
    blocks[1].proj_mlp = torch.nn.Linear(32, 100)
    with pytest.raises(UnsupportedModelError, match=r"single_transformer_blocks.1.*proj_mlp"):
        check_identical(single, blocks)


def test_check_identical_other_type(transformer: FluxTransformer2DModel, single: BlockType) -> None:
    single.blocks(transformer)[1].proj_out.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="proj_out"):
        compile_blocks(
            transformer, [single], Path("unused"), ranges=TokenRanges(), variants={None: None}
        )


def test_compile_block_unfused_adapter(
    transformer: FluxTransformer2DModel, single: BlockType, tmp_path: Path
) -> None:
    block = transformer.single_transformer_blocks[0]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj_mlp"]), block)
    with pytest.raises(UnsupportedModelError, match="fuse_lora"):
        compile_block(single, block, package=tmp_path / "p.pt2", ranges=TokenRanges())


def test_a_package_takes_the_inputs_that_it_was_compiled_for() -> None:
    transformer = tiny_transformer()
    plain, masked = family_of(transformer).block_types(transformer)
    types = [spec.dtype or torch.float32 for spec in masked.inputs]
    info = PackageInfo(
        block=masked.name,
        inputs=masked.inputs,
        input_dtypes=tuple(types),
        device="cpu",
        ranges=TokenRanges(),
        constants={},
    )
    read = PackageInfo.from_json(info.to_json())
    assert read.takes(masked.inputs)
    assert not read.takes(plain.inputs)
    assert not read.takes(masked.inputs[::-1])
    halves = (torch.float16, *types[1:])
    assert not replace(read, input_dtypes=halves).takes(masked.inputs)
