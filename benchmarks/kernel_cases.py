"""What `ops_cuda.py` times: one op at one size of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from timing import Call

LATENTS: Mapping[str, tuple[int, ...]] = {
    "FLUX 1024": (1, 16, 128, 128),
    "Wan 480p": (1, 16, 21, 60, 104),
    "Wan 720p": (1, 16, 21, 90, 160),
    "Wan 704p": (1, 16, 21, 88, 160),  # where a patch does not divide the 90 rows of 720p
}


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One op at one size, and what else moves the same bytes.

    Attributes:
        name: Op and variant.
        size: Name of the latent size.
        shape: Of the latents.
        moved_bytes: Bytes of all inputs and outputs.
        methods: By name, what makes the call of one launch, with buffers of its own.
        latency_bound: Whether its bytes say nothing of its time; then a few launches do, and what
            it works on may stay in the L2 cache.
    """

    name: str
    size: str
    shape: tuple[int, ...]
    moved_bytes: int
    methods: Mapping[str, Callable[[], Call]]
    latency_bound: bool = False
