"""Layers that read the same tensor: which they are, and one copy of their weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import CompiledBlocks, block_inputs, eager, random_lora
from diffusers import FluxTransformer2DModel
from models import tiny_transformer
from safetensors.torch import load_file, save_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from wan_models import wan_transformer

from ddit_rt.blocks import BlockTemplate, PackageInfo, TokenRanges, load_runner
from ddit_rt.blocks.compile import export_block
from ddit_rt.blocks.constants import Binding, ConstantSpec, _let_go
from ddit_rt.blocks.fused import fuse_layers
from ddit_rt.blocks.package import input_dtypes
from ddit_rt.blocks.runner import constant_specs
from ddit_rt.errors import ArtifactMismatchError
from ddit_rt.models import family_of
from ddit_rt.models.base import BlockType

SELF = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
GROUPS = {
    "FluxTransformerBlock": (SELF, TEXT),
    "FluxSingleTransformerBlock": (SELF,),
    "WanTransformerBlock": (
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
    ),
}
# float32 sums of about 100 terms in another order: a few units in the last place of values near 4.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}


def types_of(model: nn.Module) -> tuple[BlockType, ...]:
    return family_of(model).block_types(model)


def fused(block_type: BlockType, block: nn.Module) -> tuple[BlockTemplate, Any]:
    template = BlockTemplate(block_type, block)
    return template, fuse_layers(template, block_type, block)


@pytest.mark.slow
@pytest.mark.parametrize("block", [*GROUPS])
def test_groups_and_their_product(block: str, transformer: FluxTransformer2DModel) -> None:
    model = wan_transformer() if block.startswith("Wan") else transformer
    (block_type,) = (one for one in types_of(model) if one.name == block)
    own = block_type.blocks(model)[0]
    before = {name: id(one) for name, one in own.named_parameters()}
    template, groups = fused(block_type, own)
    assert groups == GROUPS[block]
    assert {name: id(one) for name, one in own.named_parameters()} == before
    inputs = block_inputs(block_type, 2, 16, 5)
    expected = eager(block_type, own, inputs)
    with torch.no_grad():
        for _ in range(2):  # nothing of a run is left for the next
            for one, other in zip(template(*inputs), expected, strict=True):
                torch.testing.assert_close(one, other, **TOLERANCE)
            inputs[0].mul_(1.5)
            expected = eager(block_type, own, inputs)
    assert products(block_type, template) == products(
        block_type, BlockTemplate(block_type, own)
    ) - sum(len(group) - 1 for group in groups)


def products(block_type: BlockType, template: BlockTemplate) -> int:
    info = PackageInfo(
        block=block_type.name,
        inputs=block_type.inputs,
        input_dtypes=input_dtypes(block_type.inputs, torch.float32),
        device="cpu",
        ranges=TokenRanges(),
        constants=constant_specs(template),
    )
    graph = export_block(template, info, torch.device("cpu")).graph
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))


def test_layers_of_another_kind_stay_apart(transformer: FluxTransformer2DModel) -> None:
    single = types_of(transformer)[1]
    block = single.blocks(transformer)[0]
    block.attn.to_v.bias = None
    block.attn.to_k.weight.data = block.attn.to_k.weight.double()
    _, groups = fused(single, block.to(torch.float32))
    assert groups == (("attn.to_q", "attn.to_k"),)


def specs_of(block_type: BlockType, block: nn.Module) -> tuple[dict[str, ConstantSpec], Any]:
    template, groups = fused(block_type, block)
    return constant_specs(template), groups


def bound(block_type: BlockType, block: nn.Module) -> Binding:
    specs, groups = specs_of(block_type, block)
    return Binding(block_type.name, specs, block, None, groups)


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: one.data_ptr() for name, one in model.named_parameters()}


def check_joined(binding: Binding, block: nn.Module, group: tuple[str, ...] = SELF) -> None:
    for key in ("weight", "bias"):
        whole = binding.tensors[f"{group[0]}.fused.{key}"]
        address = whole.data_ptr()
        own = [block.get_parameter(f"{path}.{key}") for path in group]
        for one in own:
            assert one.data_ptr() == address
            address += one.nbytes
        assert torch.equal(whole, torch.cat(own))


def test_weights_are_moved_once_and_stay_one_copy(transformer: FluxTransformer2DModel) -> None:
    transformer.requires_grad_(True)
    double = types_of(transformer)[0]
    (block,) = double.blocks(transformer)
    before = {name: (id(one), one.clone()) for name, one in block.named_parameters()}
    binding = bound(double, block)
    for group in GROUPS[double.name]:
        check_joined(binding, block, group)
    for name, one in block.named_parameters():
        assert (id(one), one.requires_grad) == (before[name][0], True)
        assert torch.equal(one, before[name][1])
    at = addresses(block)
    again = bound(double, block)  # of another runner, or another engine
    assert addresses(block) == at
    assert not binding.stale()
    with torch.no_grad():
        block.attn.to_k.weight.mul_(2)
    check_joined(binding, block)
    check_joined(again, block)


def test_one_layer_replaced_is_noticed_and_joined_again(
    compiled_blocks: CompiledBlocks, transformer: FluxTransformer2DModel
) -> None:
    single = types_of(transformer)[1]
    block = single.blocks(transformer)[0]
    plain = load_runner(compiled_blocks.package(single.name), block)
    lora = random_lora(single, block, compiled_blocks.lora)
    adapted = load_runner(compiled_blocks.package(single.name, lora=True), block, lora=lora)
    inputs = block_inputs(single, 2, 16, 5)
    assert not plain.stale()
    old = plain._binding.tensors["attn.to_q.fused.weight"].untyped_storage()
    block.attn.to_k.weight.data = block.attn.to_k.weight * 1.5
    assert plain.stale()
    assert adapted.stale()
    plain.rebind()
    adapted.rebind()
    assert not plain.stale()
    for one, other in zip(plain(*inputs), eager(single, block, inputs), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    check_joined(plain._binding, block)
    check_joined(adapted._binding, block)
    assert users(old) == 1


def users(storage: torch.UntypedStorage) -> int:
    """Tensors, and Python objects, that hold a storage: this one among them."""
    return torch._C._storage_Use_Count(storage._cdata)


def test_storage_goes_with_the_module_that_moved(transformer: FluxTransformer2DModel) -> None:
    double = types_of(transformer)[0]
    (block,) = double.blocks(transformer)
    binding = bound(double, block)
    storage = binding.tensors["attn.to_q.fused.weight"].untyped_storage()
    block.to(torch.float64)
    assert binding.stale()
    del binding
    assert users(storage) == 1


def test_storage_is_given_back_while_another_block_is_traced() -> None:
    alias = torch.ones(16)
    with FakeTensorMode():
        _let_go([alias])
    assert alias.numel() == 0


def test_weights_that_nobody_holds_are_joined_again(
    transformer: FluxTransformer2DModel,
) -> None:
    double = types_of(transformer)[0]
    (block,) = double.blocks(transformer)
    before = {name: one.clone() for name, one in block.named_parameters()}
    bound(double, block)
    check_joined(bound(double, block), block)
    assert all(torch.equal(one, before[name]) for name, one in block.named_parameters())


def test_a_plain_package_and_a_fused_one_share_a_block(
    transformer: FluxTransformer2DModel,
) -> None:
    """As with an artifact of before: bound first it is bound again before its next run."""
    single = types_of(transformer)[1]
    block = single.blocks(transformer)[0]
    specs = constant_specs(BlockTemplate(single, block))
    plain = Binding(single.name, specs, block, None)
    fused_one = bound(single, block)
    assert plain.stale()
    plain = Binding(single.name, specs, block, None)
    assert not fused_one.stale()
    assert plain.tensors["attn.to_k.weight"].data_ptr() == block.attn.to_k.weight.data_ptr()


@pytest.mark.parametrize("inside", [False, True])
def test_weights_made_in_inference_mode(inside: bool) -> None:
    with torch.inference_mode():
        transformer = tiny_transformer()
    double = types_of(transformer)[0]
    (block,) = double.blocks(transformer)
    with torch.inference_mode(inside):
        binding = bound(double, block)
    check_joined(binding, block)
    assert block.attn.to_k.weight.is_inference()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.to(torch.bfloat16), r"attn\.to_k\.weight is .*bfloat16"),
        (lambda one: one[:-1].clone(), r"attn\.to_k\.weight is \(31, 32\)"),
        (lambda one: one.t().contiguous().t(), r"attn\.to_k\.weight is not contiguous"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_and_nothing_moves(
    transformer: FluxTransformer2DModel, change: Any, message: str
) -> None:
    double = types_of(transformer)[0]
    (block,) = double.blocks(transformer)
    specs, groups = specs_of(double, block)
    block.attn.to_k.weight.data = change(block.attn.to_k.weight.data)
    at = addresses(block)
    with pytest.raises(ArtifactMismatchError, match=message):
        Binding(double.name, specs, block, None, groups)
    assert addresses(block) == at


def joined_everywhere(transformer: FluxTransformer2DModel) -> list[Binding]:
    return [bound(one, block) for one in types_of(transformer) for block in one.blocks(transformer)]


def test_saved_models_are_what_they_were(
    transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    """By diffusers in one file and in several, by safetensors, by torch: to the bit, no larger."""
    before = saved(transformer, tmp_path / "before")
    bindings = joined_everywhere(transformer)
    assert saved(transformer, tmp_path / "after") == before
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "after" / "diffusers")
    own = transformer.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    assert not any(binding.stale() for binding in bindings)


def saved(transformer: FluxTransformer2DModel, folder: Path) -> Mapping[str, Any]:
    """Contents of what is written, by file name; pickled values by their number of bytes."""
    transformer.save_pretrained(folder / "diffusers")
    transformer.save_pretrained(folder / "shards", max_shard_size="50KB")
    save_model(transformer, str(folder / "model.safetensors"))
    block = transformer.transformer_blocks[0]
    pickled = io.BytesIO()
    torch.save(block.attn.to_k.state_dict(), pickled)
    assert load_file(folder / "model.safetensors").keys() == transformer.state_dict().keys()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found: dict[str, Any] = {str(one.relative_to(folder)): one.read_bytes() for one in files}
    assert len([name for name in found if name.startswith("shards/")]) > 3
    return found | {"pickled": len(pickled.getvalue())}


def test_parameters_do_not_seem_to_share_storage(transformer: FluxTransformer2DModel) -> None:
    """By that accelerate tells which tensors it may leave out of a file."""
    joined_everywhere(transformer)
    storages = [one.untyped_storage() for one in transformer.parameters()]
    assert len({one.data_ptr() for one in storages}) == len(storages)
    sizes = [(one.untyped_storage().nbytes(), one.nbytes) for one in transformer.parameters()]
    assert all(whole == own for whole, own in sizes)


def test_a_copy_is_independent(transformer: FluxTransformer2DModel) -> None:
    bindings = joined_everywhere(transformer)
    other = copy.deepcopy(transformer)
    with torch.no_grad():
        other.transformer_blocks[0].attn.to_k.weight.zero_()
    assert transformer.transformer_blocks[0].attn.to_k.weight.abs().min() > 0
    assert not any(binding.stale() for binding in bindings)
