"""What this machine can do at best, measured: a large matrix product, and a large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MATRIX_EDGE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices whose product is timed, by kind of device."""

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Bytes of the copy that is timed."""

_WARM_UP_CALLS = 3
_WINDOWS = 7
_WINDOW_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the machine sustains.

    Attributes:
        matmul: Shape and dtype of the product, for people.
        matmul_flops_per_s: Its operations per second; a multiply-add is two.
        copy: Size of the copy, for people.
        copy_bytes_per_s: Bytes per second; bytes that are read and bytes that are written count.
    """

    matmul: str
    matmul_flops_per_s: float
    copy: str
    copy_bytes_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures both, which takes some seconds.

    Args:
        device: Where the model is.
        dtype: The model's.
    """
    edge, size = MATRIX_EDGE[device.type], COPY_BYTES[device.type]
    return Ceilings(
        matmul=f"{edge} x {edge} x {edge} {str(dtype).removeprefix('torch.')}",
        matmul_flops_per_s=matrix_rate(device, dtype),
        copy=f"{size // 2**20} MiB",
        copy_bytes_per_s=copy_rate(device),
    )


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product of random matrices; a multiply-add is two.

    The matrices are random, since a GPU draws less power, and so runs faster, on zeros. On a CPU
    the faster of torch's libraries for it.
    """
    edge = MATRIX_EDGE[device.type]
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    calls: list[Callable[[], Any]] = [lambda: torch.mm(left, right, out=result)]
    if (device.type, dtype) == ("cpu", torch.float32) and torch._C._has_mkldnn:  # noqa: SLF001
        onednn = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        calls.append(lambda: onednn(left, right, None, "none", [], ""))
    return 2 * edge**3 / min(_seconds_of(call, device) for call in calls)


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy too large for any cache."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds_of(lambda: target.copy_(source), device)


def cuda_events() -> tuple[Any, Any]:
    """Two events with a clock."""
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Mean time of a call: the median over windows, on a CPU the least.

    A GPU is to be measured at the clock that it sustains; on a CPU other windows are those in which
    it had other work.
    """
    for _ in range(_WARM_UP_CALLS):
        call()
    count = 1
    while _window(call, count, device) < _WINDOW_SECONDS:
        count *= 2
    of_windows = min if device.type == "cpu" else statistics.median
    return of_windows([_window(call, count, device) / count for _ in range(_WINDOWS)])


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
