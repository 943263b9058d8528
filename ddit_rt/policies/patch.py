"""Patch policies: which patch size each denoising step takes.

A policy is a frozen description that a user writes down once. `PatchPolicy.resolve` turns it,
for one noise schedule and the sizes that one latent shape offers, into a `PolicyTable`: plain data
that a kernel evaluates.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddit_rt import checks
from ddit_rt.errors import ShapeError
from ddit_rt.policies.cache_fit import CacheFit

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
    """Whether a text is written like a patch size, `"p"` or `"4p"`."""
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
        fine_share: Share of the regions that stay at p in a coarse step, in [0, 1).
        note: What the trace is to say of it.
    """

    forced: tuple[int, ...]
    labels: tuple[str, ...]
    thresholds: tuple[tuple[float, ...], ...]
    order: int = 3
    quantile: float = 0.4
    dwell: int = 0
    monotone: bool = False
    fine_share: float = 0.0
    note: str = ""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What a policy may know of a run before it starts.

    Attributes:
        sigmas: Noise levels from 1 to 0, `N + 1` of them.
        offered: Patch sizes that this latent shape offers, as multiples of p, ascending,
            starting with 1.
        size: Rows and columns of the latents.
        spectrum: A and b of the VAE's latents (`SpectralPolicy`), as far as they are known.
    """

    sigmas: tuple[float, ...]
    offered: tuple[int, ...]
    size: tuple[int, int] = (128, 128)
    spectrum: CacheFit | None = None

    @property
    def highest(self) -> float:
        """The highest spatial frequency, in cycles over the shorter side; one row is no side."""
        return min((side for side in self.size if side > 1), default=2) / 2

    @property
    def steps(self) -> int:
        """Number of denoising steps N."""
        return len(self.sigmas) - 1


class PatchPolicy(ABC):
    """Interface of every policy.

    Attributes:
        fine_share: Share of the regions that stay at p in a coarse step, in [0, 1).
    """

    fine_share: float = 0.0

    @abstractmethod
    def resolve(self, schedule: Schedule) -> PolicyTable:
        """The policy as plain data for one schedule.

        Raises:
            ShapeError: The policy needs a patch size that this shape does not offer.
            ValueError: The policy does not fit the number of steps.
        """

    @property
    def sizes(self) -> frozenset[int]:
        """Patch sizes that the policy names, as multiples of p."""
        return frozenset()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `policy_from_dict` is the inverse."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        if not self.fine_share:
            fields.pop("fine_share", None)
        return {"policy": type(self).__name__, **fields}


def checked_share(share: Any) -> float:
    """A `fine_share`."""
    checked = checks.number("fine_share", share, 0)
    if checked >= 1:
        expected = "a share of the regions, at least 0 and below 1"
        raise ValueError(checks.got("fine_share", share, expected))
    return checked


def fixed_table(
    schedule: Schedule, buckets: tuple[int, ...], label: str, *, note: str = ""
) -> PolicyTable:
    """The table of a plan that names the bucket of every step."""
    coarse = len(schedule.offered) - 1
    return PolicyTable(
        forced=buckets,
        labels=(label,) * schedule.steps,
        thresholds=((math.nan,) * coarse,) * schedule.steps,
        note=note,
    )


def bucket_of(multiple: int, offered: tuple[int, ...]) -> int:
    """Place of a size that a plan asks for.

    Raises:
        ShapeError: It is not offered.
    """
    if multiple not in offered:
        raise ShapeError(
            f"the plan asks for {patch_name(multiple)}, but this latent shape and model offer "
            f"only {[patch_name(size) for size in offered]}; choose another plan, or compile with "
            "that patch size and with a range of image tokens that reaches down to it"
        )
    return offered.index(multiple)
