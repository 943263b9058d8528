"""What the CUDA kernels take of a multiprocessor, as ptxas reports it for every architecture.

The kernels are compiled as CMake does, without the host part. A budget is the most that any
instance of a kernel, on any architecture, may use; it is what decides how many blocks fit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100", "120")


@dataclass(frozen=True)
class Budget:
    """Most of one thread's registers and of one block's static shared memory."""

    registers: int
    shared_bytes: int = 0


# One line for every kernel in csrc/cuda. Registers are given out in steps of 8; each budget is one
# step above what nvcc 13.0 needs. A multiprocessor has 65536 registers, and from sm_80 on 100 KiB
# of shared memory or more, so a line also says how many blocks of the kernel fit: raise it only
# knowing what that costs.
BUDGETS = {
    "pack_kernel": Budget(registers=80),  # a thread may hold 128 bytes that it has just loaded
    "begin_kernel": Budget(registers=24),
    "decide_kernel": Budget(registers=72, shared_bytes=1044),
    "finish_kernel": Budget(registers=24),
    "update_flat_kernel": Budget(registers=56),
    "update_kernel": Budget(registers=104, shared_bytes=12288),
}


@dataclass(frozen=True)
class Usage:
    """One instance of a kernel on one architecture."""

    kernel: str
    instance: str
    architecture: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


def find_nvcc() -> str | None:
    """The compiler that CMake would find."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(folder) / "bin") for folder in (*folders, "/usr/local/cuda") if folder]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [shutil.which("nvcc", path=place) for place in places]
    return next((candidate for candidate in candidates if candidate), None)


def compile_device_code(nvcc: str, source: Path, output: Path) -> str:
    """What ptxas says about the kernels of one file."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    architectures = [a for a in ARCHITECTURES if f"sm_{a}" in known.stdout.split()]
    assert {"80", "90"} <= set(architectures)  # the others need CUDA 12.8
    command = [nvcc, "-std=c++20", "-O3", "--fmad=false", "-fatbin", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command += ["--threads=2", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include")]
    command += [str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def kernel_name(symbol: str) -> str:
    """The function's own name in a mangled one: the last of its nested names."""
    assert symbol.startswith("_Z"), symbol
    rest = symbol.removeprefix("_Z").removeprefix("N")
    name = ""
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        name, rest = rest[match.end() : end], rest[end:]
    return name


def usages(report: str) -> list[Usage]:
    found = []
    for entry in report.split("Compiling entry function ")[1:]:
        head = re.match(r"'(\w+)' for 'sm_(\d+)\w*'", entry)
        used = re.search(r"Used (\d+) registers(.*)", entry)
        assert head is not None, entry
        assert used is not None, entry
        shared = re.search(r"(\d+) bytes smem", used[2])
        # A stack frame without spills is an array in local memory, which is as slow.
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        assert stack is not None, entry
        found.append(
            Usage(
                kernel=kernel_name(head[1]),
                instance=head[1],
                architecture=f"sm_{head[2]}",
                registers=int(used[1]),
                shared_bytes=int(shared[1]) if shared else 0,
                spilled_bytes=sum(map(int, stack.groups())),
            )
        )
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: set CUDACXX or put it on PATH to check the CUDA kernels' budgets")
    folder = tmp_path_factory.mktemp("ptxas")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(
            lambda source: compile_device_code(nvcc, source, folder / f"{source.stem}.fatbin"),
            SOURCES,
        )
        return [usage for report in reports for usage in usages(report)]


@pytest.mark.slow
def test_every_kernel_has_a_budget_and_every_budget_a_kernel(compiled: list[Usage]) -> None:
    kernels = {usage.kernel for usage in compiled}
    missing, stale = kernels - BUDGETS.keys(), BUDGETS.keys() - kernels
    assert not missing, (
        f"kernels without a budget: {sorted(missing)}. Add a line for each to BUDGETS in "
        f"{Path(__file__).name}, from what ptxas reports: "
        f"{[usage for usage in compiled if usage.kernel in missing]}"
    )
    assert not stale, f"budgets without a kernel in csrc/cuda: {sorted(stale)}. Remove them."


@pytest.mark.slow
def test_no_kernel_spills_or_has_a_stack(compiled: list[Usage]) -> None:
    assert [usage for usage in compiled if usage.spilled_bytes] == []


@pytest.mark.slow
def test_kernels_keep_their_budgets(compiled: list[Usage]) -> None:
    over = [
        usage
        for usage in compiled
        if usage.registers > BUDGETS[usage.kernel].registers
        or usage.shared_bytes > BUDGETS[usage.kernel].shared_bytes
    ]
    assert over == []


def test_kernel_name_is_the_last_of_the_nested_names() -> None:
    assert kernel_name("_ZN7ddit_rt4pack11pack_kernelILi16ELb0EEEvPKhPhNS0_6ParamsE") == (
        "pack_kernel"
    )
    assert kernel_name("_ZN7ddit_rt12begin_kernelENS_10LoopParamsE") == "begin_kernel"
    assert kernel_name("_Z4axpyPf") == "axpy"
