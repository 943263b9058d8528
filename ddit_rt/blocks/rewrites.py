"""What an exported block computes otherwise than it was written, where the device has better.

Each changes operations of the exported graph for others of the same value up to rounding, before
Inductor sees it. Figures: `docs/design.md`, from `benchmarks/bench_ops.py`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_map_only

from ddit_rt import _runtime
from ddit_rt import ops as _ops  # noqa: F401 - registers the ops that graphs get

_X86 = ("x86_64", "AMD64")
_SMALL_WEIGHTS = 2**20
"""Values of a weight that a core's cache keeps from one block of tokens to the next: 4 MiB."""


def rewrite_for(device: str, program: ExportedProgram) -> None:
    """All of this file that pays on a device.

    Args:
        device: `cpu` or `cuda`; a CPU is this machine's.
        program: The block, as `export_block` gives it; changed in place.
    """
    if device == "cuda":
        end_products_in_gelu(program)
        return
    if has_native_products():
        take_products_to_native(program)
        take_attention_to_native(program)
    if has_onednn_products():
        take_products_to_onednn(program)


def end_products_in_gelu(program: ExportedProgram) -> None:
    """Makes GELU, approximated by tanh, the last part of the matrix product before it.

    On CUDA that is what the product of `_addmm_activation` ends in, and a pass over the widest
    activations of a block less. On a CPU that operation has GELU's exact form.
    """
    aten = torch.ops.aten
    graph = program.graph_module.graph
    for gelu in graph.find_nodes(op="call_function", target=aten.gelu.default):
        linear = gelu.args[0]
        is_product = linear.target is aten.linear.default and len(linear.args) == 3
        is_inside = len(linear.users) == 1 and all(user.op != "output" for user in gelu.users)
        if not (is_product and is_inside and gelu.kwargs == {"approximate": "tanh"}):
            continue
        values, weight, bias = linear.args
        *rows, width = values.meta["val"].shape
        with graph.inserting_before(gelu):
            sizes = [
                size if isinstance(size, int) else _call(graph, aten.sym_size.int, values, axis)
                for axis, size in enumerate(rows)
            ]
            flat = _call(graph, aten.reshape.default, values, [-1, width])
            turned = _call(graph, aten.t.default, weight)
            out = _call(graph, aten._addmm_activation.default, bias, flat, turned, use_gelu=True)  # noqa: SLF001
            whole = _call(graph, aten.reshape.default, out, [*sizes, linear.meta["val"].shape[-1]])
        gelu.replace_all_uses_with(whole)
        graph.erase_node(gelu)
        graph.erase_node(linear)
    program.graph_module.recompile()


def has_native_products() -> bool:
    """Whether blocks on this machine's CPU call `ddit_rt::linear` and `ddit_rt::attention`.

    Their code for AVX-512, which GCC alone makes beside that of the baseline, is as fast as
    libraries' where tokens are many and weights small, and faster where tokens are few. That for
    other instruction sets is not.
    """
    has_code = _runtime.build_info()["compiler"].startswith("GNU")
    return has_code and torch.backends.cpu.get_cpu_capability() == "AVX512"


def take_products_to_native(program: ExportedProgram) -> None:
    """Has `ddit_rt::linear` compute the float32 products of tokens by small weights.

    It reads the weights once for every 48 tokens, which larger ones would be too slow for. GELU by
    tanh behind a product becomes part of it.
    """
    native = torch.ops.ddit_rt.linear.default
    graph = program.graph_module.graph
    for linear, gelu in _linears(graph):
        values, weight, *bias = linear.args
        size = weight.meta["val"].numel()
        if values.meta["val"].dim() != 3 or size > _SMALL_WEIGHTS:
            continue
        is_tanh = gelu is not None and gelu.kwargs == {"approximate": "tanh"}
        last = gelu if is_tanh else linear
        with graph.inserting_before(last):
            given = (values, weight, bias[0] if bias else None, is_tanh)
            product = graph.call_function(native, given)
        _replace(graph, product, linear, last)
    program.graph_module.recompile()


def _linears(graph: torch.fx.Graph) -> Iterator[tuple[Any, Any]]:
    """Products of a float32 weight, and the GELU behind each that nothing else reads."""
    aten = torch.ops.aten
    for linear in graph.find_nodes(op="call_function", target=aten.linear.default):
        if linear.meta["val"].dtype == torch.float32 and linear.args[1].op == "placeholder":
            (user, *more) = linear.users
            is_gelu = user.target is aten.gelu.default and not more
            yield linear, user if is_gelu else None


def _replace(graph: torch.fx.Graph, product: Node, linear: Node, last: Node) -> None:
    """Puts a product in the place of a linear layer, and of the GELU if that is the last."""
    product.meta = dict(last.meta)
    last.replace_all_uses_with(product)
    for node in dict.fromkeys((last, linear)):
        graph.erase_node(node)


def has_onednn_products() -> bool:
    """Whether blocks on this machine's CPU call oneDNN for their float32 products.

    MKL, which torch would call, leaves AVX-512 unused on x86 processors that are not Intel's: half
    the speed there, and 5 to 10 % less with AVX2. On Intel's it is as fast where there are many
    rows, and faster where there are few.
    """
    return (
        platform.machine() in _X86
        and bool(torch._C._has_mkldnn)  # noqa: SLF001
        and not (_is_intel() and torch._C.has_mkl)  # noqa: SLF001
    )


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text(encoding="utf-8")


def take_products_to_onednn(program: ExportedProgram) -> None:
    """Has oneDNN compute the float32 products, with the GELU that follows one.

    It takes weights as they are.
    """
    onednn = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
    graph = program.graph_module.graph
    for linear, gelu in _linears(graph):
        values, weight, *bias = linear.args
        ending: tuple[Any, ...] = ("none", [], "")
        if gelu is not None:
            ending = ("gelu", [], gelu.kwargs.get("approximate", "none"))
        last = gelu or linear
        with graph.inserting_before(last):
            given = (values, weight, bias[0] if bias else None, *ending)
            product = graph.call_function(onednn, given)
        _replace(graph, product, linear, last)
    program.graph_module.recompile()


def take_attention_to_native(program: ExportedProgram) -> None:
    """Has `ddit_rt::attention` compute attention in float32 that has no mask."""
    graph = program.graph_module.graph
    attention = torch.ops.aten.scaled_dot_product_attention.default
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    for node in graph.find_nodes(op="call_function", target=attention):
        query, key, value = (heads.meta["val"] for heads in node.args[:3])
        options = {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}
        scale = options.pop("scale", None)
        if any(options.values()) or query.dim() != 4 or query.dtype != torch.float32:
            continue
        width = query.shape[-1]
        shape = (*query.shape[:2], key.shape[2], width)
        if not all(
            statically_known_true(size == wanted)
            for heads in (key, value)
            for size, wanted in zip(heads.shape, shape, strict=True)
        ):
            continue
        with graph.inserting_before(node):
            turned = [_call(graph, torch.ops.aten.transpose.int, x, 1, 2) for x in node.args[:3]]
            own = torch.ops.ddit_rt.attention.default
            out = _call(graph, own, *turned, width**-0.5 if scale is None else scale)
            heads_first = _call(graph, torch.ops.aten.transpose.int, out, 1, 2)
        node.replace_all_uses_with(heads_first)
        graph.erase_node(node)
    program.graph_module.recompile()


def _call(graph: torch.fx.Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call in the graph, with what it gives."""
    node = graph.call_function(target, args, kwargs)
    given, named = tree_map_only(Node, lambda one: one.meta["val"], (args, kwargs))
    node.meta["val"] = target(*given, **named)
    return node
