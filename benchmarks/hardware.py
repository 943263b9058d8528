"""What a machine can do at best, measured beside what is compared with it; and its memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import cuda_events

from ddit_rt.lab.measure.report import machine

MATRIX_EDGE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices whose product is timed, by kind of device."""

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Bytes of the copy that is timed."""

_WARM_UP_CALLS = 3
_WINDOWS = 7
_WINDOW_SECONDS = 0.1


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


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product of random matrices; a multiply-add is two.

    Random, since a GPU draws less power, and so runs faster, on zeros. The median of several
    windows that follow on each other, which is what a GPU sustains.
    """
    edge = MATRIX_EDGE[device.type]
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * edge**3 / _seconds_of(lambda: torch.mm(left, right, out=result), device)


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy too large for any cache."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds_of(lambda: target.copy_(source), device)


def _seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Median over windows of the mean time of a call."""
    for _ in range(_WARM_UP_CALLS):
        call()
    count = 1
    while _window(call, count, device) < _WINDOW_SECONDS:
        count *= 2
    return statistics.median(_window(call, count, device) / count for _ in range(_WINDOWS))


def _window(call: Callable[[], Any], count: int, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - started
    begin, end = cuda_events()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


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
