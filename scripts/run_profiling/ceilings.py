"""What this machine can do at best, measured: a large matrix product, and a large copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hardware import COPY_BYTES, MATRIX_EDGE, copy_rate, matrix_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the machine sustains.

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
    """Takes some seconds.

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
