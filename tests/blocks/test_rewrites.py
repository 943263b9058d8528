"""What is changed in an exported block: which operations, and that their value stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ddit_rt.blocks import rewrites
from ddit_rt.blocks.rewrites import (
    end_products_in_gelu,
    has_onednn_products,
    take_attention_to_native,
    take_products_to_native,
    take_products_to_onednn,
)


def calls(program: ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


class Products(nn.Module):
    """GELU behind a product that nothing else reads, and three that have to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.other = nn.Linear(8, 16), nn.Linear(8, 16)
        self.back = nn.Linear(16, 8, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        gelu = nn.functional.gelu
        read_twice = self.other(tokens)
        return (
            self.back(gelu(self.wide(tokens), approximate="tanh")),
            self.back(gelu(self.wide(tokens))),
            self.back(gelu(read_twice, approximate="tanh")) + read_twice.mean(),
            gelu(self.back(read_twice), approximate="tanh") * 2,
        )


def products(dtype: torch.dtype) -> tuple[Products, ExportedProgram]:
    torch.manual_seed(0)
    module = Products().requires_grad_(False).to(dtype)
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    example = torch.randn(2, 5, 8, dtype=dtype)
    return module, torch.export.export(module, (example,), dynamic_shapes=shapes)


def test_gelu_by_tanh_ends_the_product_before_it() -> None:
    module, program = products(torch.float32)
    end_products_in_gelu(program)
    assert calls(program).count(torch.ops.aten._addmm_activation.default) == 1
    assert calls(program).count(torch.ops.aten.gelu.default) == 3
    tokens = torch.randn(3, 7, 8)
    found, expected = program.module()(tokens), module(tokens)
    # On a CPU the operation has the exact form.
    assert torch.allclose(found[0], module.back(nn.functional.gelu(module.wide(tokens))), atol=1e-6)
    assert all(map(torch.equal, found[1:], expected[1:]))


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_float32_are_onednns(dtype: torch.dtype) -> None:
    module, program = products(dtype)
    take_products_to_onednn(program)
    ours = dtype == torch.float32
    assert calls(program).count(torch.ops.mkldnn._linear_pointwise.default) == 7 * ours
    assert calls(program).count(torch.ops.aten.linear.default) == 7 * (not ours)
    # One is read twice.
    assert calls(program).count(torch.ops.aten.gelu.default) == (1 if ours else 4)
    tokens = torch.randn(3, 7, 8, dtype=dtype)
    found, expected = program.module()(tokens), module(tokens)
    assert all(map(torch.allclose, found, expected, [1e-5] * 4, [1e-6] * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_small_weights_are_native(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, program = products(dtype)
    take_products_to_native(program)
    ours = dtype == torch.float32
    assert calls(program).count(torch.ops.ddit_rt.linear.default) == 7 * ours
    # GELU's exact form stays, and that of a product that is read twice.
    assert calls(program).count(torch.ops.aten.gelu.default) == (2 if ours else 4)
    tokens = torch.randn(3, 7, 8, dtype=dtype)
    found, expected = program.module()(tokens), module(tokens)
    assert all(map(torch.allclose, found, expected, [1e-5] * 4, [1e-6] * 4))
    monkeypatch.setattr(rewrites, "_SMALL_WEIGHTS", 8 * 16 - 1)
    _, program = products(dtype)
    take_products_to_native(program)
    assert torch.ops.ddit_rt.linear.default not in calls(program)


def test_only_other_processors_than_intels_have_their_products_from_onednn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rewrites, "_is_intel", lambda: True)
    assert has_onednn_products() == (
        torch._C._has_mkldnn
        and rewrites._X86[0] == "x86_64"
        and not torch.backends.mkl.is_available()
    )
    monkeypatch.setattr(rewrites, "_is_intel", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not has_onednn_products()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert has_onednn_products() == torch._C._has_mkldnn


class Attention(nn.Module):
    """Attention of four kinds of arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (part.transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, **self.options)
        return out.transpose(1, 2).flatten(2)


def exported(module: nn.Module, *tensors: Tensor) -> ExportedProgram:
    batch, tokens = Dim("batch"), Dim("tokens")
    return torch.export.export(
        module, tensors, dynamic_shapes=tuple({0: batch, 1: tokens} for _ in tensors)
    )


@pytest.mark.parametrize("options", [{}, {"attn_mask": None, "scale": 0.3, "is_causal": False}])
def test_plain_attention_is_native(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = Attention(**options)
    program = exported(module, *torch.randn(3, 2, 7, 3, 8))
    take_attention_to_native(program)
    assert calls(program).count(torch.ops.ddit_rt.attention.default) == 1
    assert torch.ops.aten.scaled_dot_product_attention.default not in calls(program)
    tensors = torch.randn(3, 1, 19, 3, 8)
    assert torch.allclose(program.module()(*tensors), module(*tensors), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        ({"is_causal": True}, (2, 7, 3, 8), torch.float32),
        ({}, (2, 7, 3, 8), torch.bfloat16),
        ({"enable_gqa": True}, (2, 7, 1, 8), torch.float32),
        ({"attn_mask": torch.ones(7, 7)}, (2, 7, 3, 8), torch.float32),
    ],
    ids=["causal", "bfloat16", "grouped heads", "mask"],
)
def test_other_attention_stays_torchs(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    query = torch.randn(2, 7, 3, 8, dtype=dtype)
    key, value = torch.randn(2, *shape, dtype=dtype)
    program = torch.export.export(Attention(**options), (query, key, value))
    before = calls(program)
    take_attention_to_native(program)
    assert calls(program) == before
    assert torch.ops.aten.scaled_dot_product_attention.default in before
