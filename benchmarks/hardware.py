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


class MemoryProbe:
    """Memory of this process on a device: on CUDA the device's, on a CPU the resident set.

    On CUDA `used` and what grows from it count everything on the device, graphs and other
    processes included; the allocator's peaks count tensors alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Forgets the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # proc(5): 5 resets the peak resident set.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def used(self) -> int:
        """Bytes in use now."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def read(self) -> dict[str, int]:
        """`used_bytes` now and `peak_bytes` since `reset`; on CUDA `peak_reserved_bytes` too."""
        if self._device.type == "cuda":
            return {
                "used_bytes": self.used(),
                "peak_bytes": torch.cuda.max_memory_allocated(self._device),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device),
            }
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return {"used_bytes": self.used(), "peak_bytes": int(line.split()[1]) * 1024}
