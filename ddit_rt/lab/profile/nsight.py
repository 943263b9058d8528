"""Command lines of NVIDIA Nsight Systems and Nsight Compute around a run.

The profiled process, `ddit-rt profile --tool nvtx`, opens the capture range after its warm-up.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

TOOLS = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}
_FOLDER = Path("/usr/local/cuda/bin")


def find_tool(name: str) -> str | None:
    """Path of `nsys` or `ncu`, on the search path or in the CUDA toolkit; None without it."""
    return shutil.which(name) or shutil.which(name, path=_FOLDER)


def missing_tool(name: str) -> str:
    """What to do about a tool that is not there."""
    return (
        f"{name} is not on PATH, nor in {_FOLDER}: install {TOOLS[name]} (it comes with the CUDA "
        f"toolkit, and alone from developer.nvidia.com), use --tool torch, which needs nothing "
        "else, or print the command for another machine with --print-command"
    )


def nsys_command(nsys: str, child: Sequence[str], out: Path) -> list[str]:
    """Nsight Systems over the capture range, with every node of a CUDA graph.

    Args:
        nsys: The program.
        child: Command to profile.
        out: Folder; the report becomes `nsys.nsys-rep` in it.
    """
    return [
        nsys,
        "profile",
        "--trace=cuda,nvtx,cublas,cudnn",
        "--cuda-graph-trace=node",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--sample=none",
        "--cpuctxsw=none",
        "--force-overwrite=true",
        f"--output={out / 'nsys'}",
        *child,
    ]


def nsys_stats_command(nsys: str, out: Path) -> list[str]:
    """Tables of that report: device time of every range, and of every kernel."""
    return [
        nsys,
        "stats",
        "--force-export=true",
        "--report=nvtx_gpu_proj_sum",
        "--report=cuda_gpu_kern_sum",
        str(out / "nsys.nsys-rep"),
    ]


def ncu_command(
    ncu: str, child: Sequence[str], out: Path, *, patch: str, launches: int
) -> list[str]:
    """Nsight Compute over the model calls at one patch size.

    Args:
        ncu: The program.
        child: Command to profile.
        out: Folder; the report becomes `ncu-{patch}.ncu-rep` in it.
        patch: Patch size by name.
        launches: Kernels to profile; each is run again for every group of counters.
    """
    return [
        ncu,
        "--set=full",
        "--graph-profiling=node",
        "--profile-from-start=off",
        "--nvtx",
        # Inside a name a slash would mean nesting, so dots stand for them; at its end it says that
        # the range is pushed and popped.
        f"--nvtx-include=regex:ddit_rt.model.{patch}/",
        f"--launch-count={launches}",
        "--target-processes=all",
        "--force-overwrite",
        f"--export={out / f'ncu-{patch}'}",
        *child,
    ]
