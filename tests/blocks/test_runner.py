from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from block_models import CompiledBlocks, block_inputs, eager, random_lora
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ddit_rt.blocks import CompiledRunner, EagerRunner, LoadedPackage, TokenRanges, load_runner
from ddit_rt.blocks.machine import unpack_folder
from ddit_rt.errors import ArtifactError, ArtifactMismatchError, ShapeError
from ddit_rt.models import family_of
from ddit_rt.models.base import BlockType

CPU = torch.device("cpu")
# float32 sums of about 100 terms in another order: a few units in the last place of values near 4.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}


@pytest.fixture(params=["FluxTransformerBlock", "FluxSingleTransformerBlock"])
def block_type(request: pytest.FixtureRequest, transformer: FluxTransformer2DModel) -> BlockType:
    types = family_of(transformer).block_types(transformer)
    (found,) = (block_type for block_type in types if block_type.name == request.param)
    return found


@pytest.fixture
def block(transformer: FluxTransformer2DModel, block_type: BlockType) -> nn.Module:
    return block_type.blocks(transformer)[-1]


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_run_compiled_equals_eager(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    runner = load_runner(compiled_blocks.package(block_type.name), block)
    for sizes in ((1, 4, 1), (1, 16, 7), (3, 9, 1), (4, 64, 16), (8, 4, 2), (1, 1024, 77)):
        inputs = block_inputs(block_type, *sizes)
        assert_close(runner(*inputs), eager(block_type, block, inputs))


def test_run_chained_blocks_equal_eager(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel
) -> None:
    # Outputs feed the next package as they are, so their layout matters too.
    double, single = family_of(transformer).block_types(transformer)
    hidden, text, modulation, *rotary = block_inputs(double, 3, 16, 5)
    expected_hidden, expected_text = hidden, text
    for block in double.blocks(transformer):
        runner = load_runner(compiled_blocks.package(double.name), block)
        text, hidden = runner(hidden, text, modulation, *rotary)
        expected_text, expected_hidden = eager(
            double, block, [expected_hidden, expected_text, modulation, *rotary]
        )
    joint = torch.cat((text, hidden), dim=1)
    expected = torch.cat((expected_text, expected_hidden), dim=1)
    _, modulation, *_ = block_inputs(single, 3, 16, 5)
    for block in single.blocks(transformer):
        runner = load_runner(compiled_blocks.package(single.name), block)
        (joint,) = runner(joint, modulation, *rotary)
        (expected,) = eager(single, block, [expected, modulation, *rotary])
    assert_close((joint,), (expected,))


def test_run_lora_equals_peft(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    spec = compiled_blocks.lora
    lora = random_lora(block_type, block, spec)
    inputs = block_inputs(block_type, 2, 16, 5)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.rank * spec.scaling),
        target_modules=list(block_type.feed_forward),
    )
    adapted = inject_adapter_in_model(config, copy.deepcopy(block))
    for name, value in lora.items():
        layer, factor, _ = name.rsplit(".", 2)
        adapted.get_parameter(f"{layer}.{factor}.default.weight").data.copy_(value)
    expected = eager(block_type, adapted, inputs)
    runner = load_runner(compiled_blocks.package(block_type.name, lora=True), block, lora=lora)
    plain = eager(block_type, block, inputs)
    assert (expected[-1] - plain[-1]).abs().max() > 0.1
    assert_close(runner(*inputs), expected)
    reference = EagerRunner(block_type, block, ranges=TokenRanges(), lora_spec=spec, lora=lora)
    assert_close(reference(*inputs), expected)


def test_eager_runner_equals_block(block_type: BlockType, block: nn.Module) -> None:
    runner = EagerRunner(block_type, block, ranges=TokenRanges())
    inputs = block_inputs(block_type, 2, 9, 3)
    assert_close(runner(*inputs), eager(block_type, block, inputs))
    assert all(output.is_contiguous() for output in runner(*inputs))


def test_bind_weights_fused_in_place_are_seen(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    plain = load_runner(compiled_blocks.package(block_type.name), block)
    lora = random_lora(block_type, block, compiled_blocks.lora)
    adapted = load_runner(compiled_blocks.package(block_type.name, lora=True), block, lora=lora)
    inputs = block_inputs(block_type, 1, 16, 5)
    before = adapted(*inputs)
    for name in block_type.feed_forward:
        block.get_parameter(f"{name}.weight").mul_(1.5)
    assert not plain.stale()
    assert_close(plain(*inputs), eager(block_type, block, inputs))
    assert (adapted(*inputs)[-1] - before[-1]).abs().max() > 0.1


def test_bind_uses_storage_of_the_module(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    runner = load_runner(compiled_blocks.package(block_type.name), block)
    assert runner._binding is not None
    live = {
        name: value.data_ptr()
        for name, value in block.named_parameters()
        if not name.startswith(("norm1.", "norm1_context.", "norm."))  # made ahead of the run
    }
    bound = {name: value.data_ptr() for name, value in runner._binding.tensors.items()}
    for group in runner.info.fused:
        for key in ("weight", "bias"):
            address = bound.pop(f"{group[0]}.fused.{key}")
            for path in group:
                bound[f"{path}.{key}"] = address
                address += block.get_parameter(f"{path}.{key}").nbytes
    assert bound == live


def test_bind_after_peft_injection_finds_base_weights(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    inputs = block_inputs(block_type, 1, 16, 5)
    expected = eager(block_type, block, inputs)
    early = load_runner(compiled_blocks.package(block_type.name), block)
    config = LoraConfig(r=2, target_modules=list(block_type.feed_forward))
    inject_adapter_in_model(config, block)
    late = load_runner(compiled_blocks.package(block_type.name), block)
    assert not early.stale()
    assert_close(late(*inputs), expected)


def test_rebind_after_weights_moved(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    runner = load_runner(compiled_blocks.package(block_type.name), block)
    reference = EagerRunner(block_type, block, ranges=TokenRanges())
    inputs = block_inputs(block_type, 1, 16, 5)
    before = runner(*inputs)
    block.to(torch.float64).to(torch.float32)  # new storage, as after pipe.to(...)
    for parameter in block.parameters():
        parameter.data.mul_(0.5)
    assert runner.stale()
    assert reference.stale()
    assert_close(runner(*inputs), before)  # the old storage is kept alive
    runner.rebind()
    reference.rebind()
    assert not runner.stale()
    block.load_state_dict({n: v.clone() for n, v in block.state_dict().items()}, assign=True)
    assert runner.stale()
    runner.rebind()
    reference.rebind()
    assert_close(runner(*inputs), eager(block_type, block, inputs))
    assert_close(reference(*inputs), eager(block_type, block, inputs))


def test_run_before_bind_is_refused(compiled_blocks: CompiledBlocks, block_type: BlockType) -> None:
    runner = CompiledRunner(LoadedPackage(compiled_blocks.package(block_type.name), device=CPU))
    with pytest.raises(RuntimeError, match="bind the runner"):
        runner(*block_inputs(block_type, 1, 16, 5))


def wrong_inputs(block_type: BlockType) -> Iterator[tuple[list[Tensor], str]]:
    good = block_inputs(block_type, 2, 16, 5)
    double = len(block_type.inputs) == 5
    first, second, modulation, cos, sin = good[0], good[1], good[-3], good[-2], good[-1]

    def with_other(place: int, tensor: Tensor) -> list[Tensor]:
        tensors = list(good)
        tensors[place] = tensor
        return tensors

    yield with_other(-2, cos[:-1]), "rotary_(sin|cos)"
    yield [*good[:-2], cos[:-1], sin[:-1]], "20 positions for 16 image|image\\+text = 21"
    more = torch.cat([second, second[:1]])
    yield with_other(1, more), "encoder_hidden_states" if double else "modulation"
    yield [*good, first], f"takes {len(good)} tensors"
    yield with_other(0, first.double()), "compiled for torch.float32, got torch.float64"
    yield with_other(0, first[0]), f"expected \\(batch, image{'' if double else '.text'}, 32\\)"
    yield with_other(-3, torch.cat([modulation, modulation], dim=1)), "modulation"
    yield with_other(0, first.transpose(0, 1).contiguous().transpose(0, 1)), "contiguous"
    few = block_inputs(block_type, 1, 2, 2)
    yield few, "image is 2.*compiled for 4.*: choose" if double else "text is 4.* for 5"
    yield block_inputs(block_type, 9, 4, 1), "batch is 9"
    long = block_inputs(block_type, 1, 16384, 513)
    yield long, "text is 513" if double else "text is 16897"


def test_run_wrong_inputs_are_refused(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    compiled = load_runner(compiled_blocks.package(block_type.name), block)
    for runner in (compiled, EagerRunner(block_type, block, ranges=TokenRanges())):
        runner(*block_inputs(block_type, 2, 16, 5))
        for inputs, message in wrong_inputs(block_type):
            with pytest.raises(ShapeError, match=message):
                runner(*inputs)


def test_bind_without_factors_is_refused(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    with pytest.raises(ArtifactMismatchError, match="needs .*lora_[AB].weight"):
        load_runner(compiled_blocks.package(block_type.name, lora=True), block)


def test_bind_factors_to_plain_package_is_refused(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    lora = random_lora(block_type, block, compiled_blocks.lora)
    with pytest.raises(ArtifactMismatchError, match="no place for"):
        load_runner(compiled_blocks.package(block_type.name), block, lora=lora)


def test_bind_other_type_is_refused(
    compiled_blocks: CompiledBlocks, block_type: BlockType, block: nn.Module
) -> None:
    with pytest.raises(ArtifactMismatchError, match=r"torch.bfloat16.*torch.float32"):
        load_runner(compiled_blocks.package(block_type.name), block.to(torch.bfloat16))


def test_bind_other_block_is_refused(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel
) -> None:
    package = compiled_blocks.package("FluxTransformerBlock")
    with pytest.raises(ArtifactMismatchError, match="has no tensor"):
        load_runner(package, transformer.single_transformer_blocks[0])


def test_load_missing_package(tmp_path: Path, transformer: FluxTransformer2DModel) -> None:
    with pytest.raises(ArtifactError, match="no package at"):
        load_runner(tmp_path / "package.pt2", transformer.transformer_blocks[0])


def test_load_damaged_package(tmp_path: Path, transformer: FluxTransformer2DModel) -> None:
    path = tmp_path / "package.pt2"
    path.write_bytes(b"PK not a package")
    with pytest.raises(ArtifactError, match="cannot be loaded.*compile it again"):
        load_runner(path, transformer.transformer_blocks[0])


def test_load_without_a_place_to_unpack(
    compiled_blocks: CompiledBlocks,
    transformer: FluxTransformer2DModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    package = compiled_blocks.package("FluxTransformerBlock")
    if unpack_folder()[0] != tmp_path / "file":
        load_runner(package, transformer.transformer_blocks[0])
        return
    with pytest.raises(ArtifactError, match="file, which cannot be written.*set TMPDIR"):
        load_runner(package, transformer.transformer_blocks[0])


def test_load_foreign_package(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    path = tmp_path / "package.pt2"
    with (
        zipfile.ZipFile(compiled_blocks.package("FluxTransformerBlock")) as source,
        zipfile.ZipFile(path, "w") as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b'"ddit_rt"', b'"other__"'))
    with pytest.raises(ArtifactError, match="was not written by ddit_rt"):
        load_runner(path, transformer.transformer_blocks[0])


def test_load_runners_share_the_weights(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel
) -> None:
    block = transformer.transformer_blocks[0]
    package = compiled_blocks.package("FluxTransformerBlock")
    first = load_runner(package, block)
    before = resident_bytes()
    runners = [load_runner(package, block) for _ in range(8)]
    # Each brings its code (under 2 MiB) and no weights.
    assert (resident_bytes() - before) / len(runners) < 3 * 2**20
    assert all(runner.info == first.info for runner in runners)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
