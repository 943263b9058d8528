"""What blocks become on CUDA, where a torch that generates code for it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_lowering.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch makes no code for CUDA"),
]


CLASSES = ("FluxTransformerBlock", "FluxSingleTransformerBlock", "WanTransformerBlock")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return lowered(tmp_path_factory, CLASSES)["blocks"]


def lowered(
    tmp_path_factory: pytest.TempPathFactory, classes: tuple[str, ...], *options: str
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lowered")
    stub = ["g++", "-shared", "-xc++", "/dev/null", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*stub, "-o", str(folder / "libcuda.so")], check=True)
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    environment = {**os.environ, "CUDA_HOME": home, "LIBRARY_PATH": str(folder)}
    out = folder / "lowered.json"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--blocks", *classes, *options]
    subprocess.run(command, check=True, env=environment, cwd=folder)
    found: dict[str, Any] = json.loads(out.read_text())
    assert {name for blocks in found.values() if isinstance(blocks, dict) for name in blocks} >= {
        *classes
    }
    return found


def test_no_kernel_loads_single_channels(blocks: dict[str, Any]) -> None:
    for block in blocks.values():
        assert all(kernel["loads_16_bit"] == 0 for kernel in block["kernels"].values())
        assert all(kernel["instructions"] > 0 for kernel in block["kernels"].values())


def test_gelu_is_part_of_the_product_before_it(blocks: dict[str, Any]) -> None:
    assert blocks["FluxTransformerBlock"]["gelu_in_product"] == 2
    assert blocks["FluxSingleTransformerBlock"]["gelu_in_product"] == 1
    assert blocks["WanTransformerBlock"]["gelu_in_product"] == 1
    names = [name for block in blocks.values() for name in block["kernels"]]
    assert not [name for name in names if "gelu" in name]


def test_passes_over_memory_are_as_few_as_they_were(blocks: dict[str, Any]) -> None:
    assert blocks["FluxTransformerBlock"]["launches"] <= 11
    single = blocks["FluxSingleTransformerBlock"]
    assert single["launches"] <= 3
    wan = blocks["WanTransformerBlock"]
    assert wan["launches"] <= 7
    assert single["copies"] == wan["copies"] == []


def test_layers_of_the_same_tokens_are_one_product_and_modulation_is_made_ahead(
    blocks: dict[str, Any],
) -> None:
    most = {"FluxTransformerBlock": 8, "FluxSingleTransformerBlock": 4, "WanTransformerBlock": 7}
    for name, block in blocks.items():
        products = sum(block["calls"].get(name, 0) for name in ("addmm_out", "mm_out", "bmm_out"))
        assert products + block["gelu_in_product"] <= most[name]


def test_products_in_fp8_take_what_they_quantise_from_the_pass_before(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    pytest.importorskip("torchao")
    name = "FluxSingleTransformerBlock"
    block = lowered(tmp_path_factory, (name,), "--fp8")["fp8"][name]
    assert block["calls"]["_scaled_mm_out"] == 5
    assert not {"addmm_out", "mm_out", "bmm_out"} & block["calls"].keys()
    assert block["launches"] <= 4
    assert block["copies"] == []
