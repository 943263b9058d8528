"""What a machine has, as far as it explains a result: GPU, driver, versions, tools.

`info.json`, version 1: `measured_at`, `host`, `cpu`, `cores`, `python`, `torch` (`version`, `cuda`,
`available`, `gpus`), `packages` (version or null), `tools` (path or null), `nvcc`, `driver`
(nvidia-smi, one entry per GPU), `ddit_rt` (`build`, `cuda_status`; null where it is not built).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from typing import Any

SCHEMA_VERSION = 1

PACKAGES = (
    "ddit_rt",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pytest",
    "pybind11",
    "scikit-build-core",
    "cmake",
    "ninja",
)
TOOLS = ("nvcc", "nsys", "ncu", "compute-sanitizer", "cuobjdump", "cmake", "ninja", "g++")
_CUDA_BIN = "/usr/local/cuda/bin"
_SMI_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "mig.mode.current",
)


def describe() -> dict[str, Any]:
    """The record. Nothing that is missing is an error."""
    tools = {name: shutil.which(name) or shutil.which(name, path=_CUDA_BIN) for name in TOOLS}
    return {
        "schema_version": SCHEMA_VERSION,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": _torch(),
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": tools,
        "nvcc": _last_line([tools["nvcc"], "--version"]) if tools["nvcc"] else None,
        "driver": _driver(),
        "ddit_rt": _ddit_rt(),
    }


def problem(record: dict[str, Any]) -> str | None:
    """Why this machine cannot run the battery; None if it can."""
    torch = record["torch"]
    if torch is None:
        return "no PyTorch in this Python: set PYTHON to one that has it"
    if not torch["available"]:
        smi = "nvidia-smi sees no GPU" if not record["driver"] else "nvidia-smi sees a GPU"
        return f"no CUDA device: torch {torch['version']} (CUDA {torch['cuda']}) has none, {smi}"
    return None


def _torch() -> dict[str, Any] | None:
    try:
        import torch
    except ImportError:
        return None
    available = torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "available": available,
        "gpus": [_gpu(torch.cuda.get_device_properties(index)) for index in range(count)],
    }


def _gpu(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _ddit_rt() -> dict[str, Any] | None:
    try:
        from ddit_rt import _runtime
    except ImportError:
        return None
    return {"build": dict(_runtime.build_info()), "cuda_status": dict(_runtime.cuda_status())}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> list[dict[str, str]]:
    text = _output(["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"])
    return [
        dict(zip(_SMI_FIELDS, (value.strip() for value in line.split(",")), strict=False))
        for line in text.splitlines()
    ]


def _last_line(command: list[str | None]) -> str | None:
    lines = _output([word for word in command if word]).split("\n")
    return lines[-1].strip() or None


def _output(command: list[str]) -> str:
    """Standard output of a command, stripped; empty if it is missing or fails."""
    try:
        done = subprocess.run(  # noqa: S603 - the words above
            command, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a device file
            lines = [line for line in file if line.startswith("model name")]
    except OSError:
        return platform.machine()
    return lines[0].partition(":")[2].strip() if lines else platform.machine()
