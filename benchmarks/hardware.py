"""What a machine can do at best, measured beside what is compared with it; and its memory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from ddit_rt.lab.measure.report import machine
from ddit_rt.lab.profile.ceilings import copy_rate, matrix_rate


def machine_entry(device: torch.device) -> dict[str, Any]:
    """The entry `machine`: host, and the GPU if there is one to be used."""
    entry = machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        entry["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            **_driver_entry(device),
        }
    return entry


def device_name(entry: dict[str, Any]) -> str:
    """Name of what the timings of a machine entry are of."""
    return str(entry["gpu"]["name"] if "gpu" in entry else entry["cpu"])


def _driver_entry(device: torch.device) -> dict[str, str]:
    """Driver, power limit and clock as nvidia-smi tells them; empty where it cannot be asked."""
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = lines.stdout.splitlines()[device.index or 0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip((name.replace(".", "_") for name in fields), values, strict=False))


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Both rates that floors are made of."""
    return {
        "matrix_flops_per_second": matrix_rate(device, dtype),
        "copy_bytes_per_second": copy_rate(device),
    }


def resident_bytes() -> int:
    """The resident set of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
