"""What this machine can do at best, measured: a large matrix product, and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_ROUNDS = 5
_MATMUL = {"cpu": 1024, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Best of several calls each, after one that warms up.

    Attributes:
        matmul: Shape and dtype of the product, for people.
        matmul_flops_per_s: Its operations per second; a multiply-add is two.
        copy: Size of the copy, for people.
        copy_bytes_per_s: Bytes per second, read and written ones both counted.
    """

    matmul: str
    matmul_flops_per_s: float
    copy: str
    copy_bytes_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes a second or two.

    Args:
        device: Where the model is.
        dtype: The model's.
    """
    n, size = _MATMUL[device.type], _COPY_BYTES[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul = _best_seconds(lambda: torch.mm(a, b, out=product), device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return Ceilings(
        matmul=f"{n} x {n} x {n} {str(dtype).removeprefix('torch.')}",
        matmul_flops_per_s=2 * n**3 / matmul,
        copy=f"{size // 2**20} MiB",
        copy_bytes_per_s=2 * size / copy,
    )


def _best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    timed = _device_seconds if device.type == "cuda" else _wall_seconds
    call()
    return min(timed(call) for _ in range(_ROUNDS))


def _wall_seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _device_seconds(call: Callable[[], Any]) -> float:
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record()
    call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3
