"""Packages that several blocks share, and what stays of those that are dropped."""

from __future__ import annotations

import pytest
import torch
from block_models import CompiledBlocks, block_inputs, eager, random_lora
from diffusers import FluxTransformer2DModel

from ddit_rt.blocks import CompiledRunner, LoadedPackage, load_runner
from ddit_rt.models import family_of

CPU = torch.device("cpu")
# float32 sums of about 100 terms in another order: a few units in the last place of values near 4.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}


def test_shared_package_serves_blocks_in_any_order(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel
) -> None:
    """As blocks of one type do on CUDA, to the bit; plain ones, and with factors of adapters."""
    block_type = family_of(transformer).block_types(transformer)[1]
    first, second = block_type.blocks(transformer)
    factors = [random_lora(block_type, first, compiled_blocks.lora, seed) for seed in (0, 1)]
    inputs = block_inputs(block_type, 2, 16, 5)
    for lora, cases in (
        (False, [(first, None), (second, None)]),
        (True, [(first, factors[0]), (first, factors[1]), (second, factors[0])]),
    ):
        path = compiled_blocks.package(block_type.name, lora=lora)
        own = [load_runner(path, block, lora=values)(*inputs) for block, values in cases]
        package = LoadedPackage(path, device=CPU)
        runners = []
        for block, values in cases:
            runner = CompiledRunner(package)
            runner.bind(block, values)
            runners.append(runner)
        order = [*range(len(cases)), *reversed(range(len(cases))), 0, 0]
        for index in order:
            shared = runners[index](*inputs)
            assert all(torch.equal(a, b) for a, b in zip(shared, own[index], strict=True))


def test_shared_package_follows_a_block_that_moved(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel
) -> None:
    block_type = family_of(transformer).block_types(transformer)[1]
    package = LoadedPackage(compiled_blocks.package(block_type.name), device=CPU)
    runners = []
    for block in block_type.blocks(transformer):
        runner = CompiledRunner(package)
        runner.bind(block)
        runners.append(runner)
    first, second = runners
    inputs = block_inputs(block_type, 1, 16, 5)
    before, other = first(*inputs), second(*inputs)
    moved = block_type.blocks(transformer)[0]
    moved.to(torch.float64).to(torch.float32)
    for parameter in moved.parameters():
        parameter.data.mul_(0.5)
    assert (first.stale(), second.stale()) == (True, False)
    assert all(map(torch.equal, first(*inputs), before))  # the old storage is kept alive
    first.rebind()
    torch.testing.assert_close(first(*inputs), eager(block_type, moved, inputs), **TOLERANCE)
    assert all(map(torch.equal, second(*inputs), other))
    assert not first.stale()


def test_packages_are_shared_where_a_capture_may_change_their_tensors(
    compiled_blocks: CompiledBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = LoadedPackage(compiled_blocks.package("FluxTransformerBlock"), device=CPU)
    monkeypatch.setattr("ddit_rt.blocks.runner.TORCH", (2, 11))
    assert not package.shared
    package.device = torch.device("cuda", 0)
    assert package.shared
    monkeypatch.setattr("ddit_rt.blocks.runner.TORCH", (2, 13))
    assert not package.shared


def test_dropped_runner_gives_storage_back(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel
) -> None:
    """Torch's loader keeps handles of constants for good; the memory must not stay with them."""
    block_type = family_of(transformer).block_types(transformer)[0]
    (block,) = block_type.blocks(transformer)
    runner = load_runner(compiled_blocks.package(block_type.name), block)
    inputs = block_inputs(block_type, 1, 16, 5)
    runner(*inputs)
    old = {name: value.untyped_storage() for name, value in block.named_parameters()}
    block.to(torch.float64).to(torch.float32)
    runner.rebind()
    torch.testing.assert_close(runner(*inputs), eager(block_type, block, inputs), **TOLERANCE)
    alone = torch.zeros(1).untyped_storage()
    assert {users(storage) for storage in old.values()} == {users(alone)}
    held = block.ff.net[2].weight.untyped_storage()
    before = users(held)
    del runner
    assert users(held) == before - 1


def users(storage: torch.UntypedStorage) -> int:
    """Tensors, and Python objects, that hold a storage."""
    return torch._C._storage_Use_Count(storage._cdata)
