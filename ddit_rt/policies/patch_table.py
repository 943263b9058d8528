"""Patch sizes by name, and a policy as plain data that a kernel evaluates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddit_rt import checks

_PATTERN = re.compile(r"([1-9][0-9]*)?p")


def parse_patch(patch: Any, name: str = "patch_size") -> int:
    """The multiple of p that a name stands for: `"p"` is 1, `"4p"` is 4; an int is itself.

    Args:
        patch: What came.
        name: What the caller calls it, for messages.

    Raises:
        TypeError: Neither text nor a whole number.
        ValueError: Not a patch name, or not a power of two.
    """
    if isinstance(patch, str):
        if not is_patch(patch):
            raise ValueError(f'got {name}={patch!r}; patch sizes are written "p", "2p", "4p"')
        multiple = int(patch.strip()[:-1] or 1)
    else:
        multiple = checks.whole(name, patch)
    if multiple < 1 or multiple & (multiple - 1):
        raise ValueError(f"got {name}={patch!r}; multiples of p are powers of two")
    return multiple


def is_patch(text: str) -> bool:
    """Whether a text is written like a patch size."""
    return _PATTERN.fullmatch(text.strip()) is not None


def patch_name(multiple: int) -> str:
    """`1` is `"p"`, `4` is `"4p"`."""
    return "p" if multiple == 1 else f"{multiple}p"


DYNAMIC = -1
"""Entry of `PolicyTable.forced` for a step that the scores decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTable:
    """A policy, resolved for one schedule and the patch sizes that one latent shape offers.

    Bucket 0 is the base patch p; bucket i > 0 is the i-th offered coarse size, ascending.

    Attributes:
        forced: Per step, the bucket to take, or `DYNAMIC`.
        labels: Per step, why the bucket is forced (`"warm-up"`, `"static plan"`, ...); empty
            for a dynamic step.
        thresholds: Per step, tau of each coarse bucket.
        order: Order of the finite difference, 1 to 3.
        quantile: rho, in [0, 1].
        dwell: Steps that a size is kept at least before the scores may change it.
        monotone: Whether the scores may never choose a coarser size than the current one.
    """

    forced: tuple[int, ...]
    labels: tuple[str, ...]
    thresholds: tuple[tuple[float, ...], ...]
    order: int = 3
    quantile: float = 0.4
    dwell: int = 0
    monotone: bool = False

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.forced)

    def scored(self, step: int) -> bool:
        """Whether this step's decision needs the scores."""
        return self.forced[step] == DYNAMIC

    def reachable(self) -> frozenset[int]:
        """Buckets that a run under this table can choose."""
        forced = {bucket for bucket in self.forced if bucket != DYNAMIC}
        if DYNAMIC in self.forced:
            forced.update(range(1 + len(self.thresholds[0])))
        return frozenset(forced)

    def coarse_after_fine(self) -> bool:
        """Whether a coarse step can follow a step at p, so that detail is worth keeping."""
        fine_seen = False
        for bucket in self.forced:
            if fine_seen and (bucket > 0 or (bucket == DYNAMIC and not self.monotone)):
                return True
            fine_seen = fine_seen or bucket in (0, DYNAMIC)
        return False

    def tensors(self) -> tuple[Tensor, Tensor]:
        """`forced` as int32 `[N]` and `thresholds` as float32 `[N, S]`."""
        forced = torch.tensor(self.forced, dtype=torch.int32, device="cpu")
        width = len(self.thresholds[0]) if self.thresholds else 0
        thresholds = torch.tensor(self.thresholds, dtype=torch.float32, device="cpu")
        return forced, thresholds.reshape(self.steps, width)
