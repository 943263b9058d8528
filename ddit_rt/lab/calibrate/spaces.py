"""What a calibration searches: for each kind of plan a first template, and variations of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ddit_rt.lab.plans.candidates import (
    CACHED,
    DYNAMIC,
    STATIC,
    STEPS,
    Cached,
    CacheRange,
    Dynamic,
    FewerSteps,
    Static,
    Template,
)
from ddit_rt.policies import DDiTPolicy

_LEAST_STEPS = 7
"""Steps below which a plan with coarse steps has no room for its fine start and end."""

Variations = Mapping[str, Sequence[Any]]
"""Values to try, by the field of the template, of its policy or of its step cache that they set.

Two names are verbs: `fewer` multiplies the number of steps, `rescale` the cache's threshold.
"""

_STATIC: Variations = {
    "refresh": (None, 2, 1, 5),
    "head": (0, 1, 5),
    "tail": (1, 4),
    "fewer": (0.75, 0.75),
}
_DYNAMIC: Variations = {
    "warmup": ("coarse",),
    "refresh": (None, 2),
    "fine_tail": (1, 4),
    "fewer": (0.75, 0.75),
    "warmup_steps": (5,),
    "dwell": (3,),
}
_CACHED: Variations = {
    "first": (3, 6),
    "max_skip_steps": (5, 2),
    "fewer": (0.75, 0.75),
    "retention_ratio": (0.1,),
    "last": (2,),
}
COMBINED: Variations = {"rescale": (2.0, 0.5, 1.5, 0.7), **_DYNAMIC}
"""What varies in dynamic plans with a step cache. Where the patch size changes, no step reuses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Plans of one kind, which are searched together.

    Attributes:
        kind: Their kind, as in `Candidate.kind`.
        start: The first template.
        variations: Values by field, likely ones first.
        level: Level at which the first template's dial starts; None for the middle.
    """

    kind: str
    start: Template
    variations: Variations = field(default_factory=dict)
    level: int | None = None

    def in_turn(self) -> Iterator[tuple[str, Any]]:
        """Yields the first value of every field, then the second ones, and so on."""
        for place in range(max(map(len, self.variations.values()), default=0)):
            for name, values in self.variations.items():
                if place < len(values):
                    yield name, values[place]


def spaces(
    steps: int,
    coarse: tuple[str, ...],
    taus: tuple[float, float],
    caches: Sequence[CacheRange] = (),
) -> tuple[Space, ...]:
    """Lists what is searched for a number of steps.

    Args:
        steps: Steps of the reference.
        coarse: Coarse sizes that the model offers, ascending.
        taus: Range of tau.
        caches: Step caches that the model has a fit for.

    Returns:
        Fewer steps; with a coarse size, and steps enough for one, static and dynamic plans; with a
        step cache, steps at p of which some reuse.
    """
    found = [Space(kind=STEPS, start=FewerSteps(steps=steps))]
    if coarse and steps >= _LEAST_STEPS:
        # A size of twice the side has about half of the other's threshold at equal error.
        halved = tuple((size, 0.5**index) for index, size in enumerate(coarse))
        several = len(coarse) > 1
        orders = {"coarse": (coarse[:1], coarse[::-1])} if several else {}
        factors = {"factors": (halved[:1],)} if several else {}
        static = Static(steps=steps, coarse=coarse[-1:])
        dynamic = Dynamic(
            steps=steps, factors=halved, taus=taus, policy=DDiTPolicy(refresh=3, criterion="raw")
        )
        found.append(Space(kind=STATIC, start=static, variations={**_STATIC, **orders}))
        found.append(Space(kind=DYNAMIC, start=dynamic, variations={**_DYNAMIC, **factors}))
    if caches:
        start = Cached(steps=steps, range=caches[0])
        found.append(Space(kind=CACHED, start=start, variations={"range": caches[1:], **_CACHED}))
    return tuple(found)


def varied(template: Any, name: str, value: Any) -> Template | None:
    """A template with one variation; None where it does not apply."""
    found: Template | None = None
    if name == "fewer":
        steps = round(template.steps * value)
        found = replace(template, steps=steps) if steps >= _LEAST_STEPS else None
    elif name == "rescale":
        threshold = float(f"{template.cache.threshold * value:.4g}")
        found = replace(template, cache=replace(template.cache, threshold=threshold))
    elif hasattr(template, name):
        found = replace(template, **{name: value})
    elif isinstance(template, Dynamic):
        found = replace(template, policy=replace(template.policy, **{name: value}))
    elif hasattr(template.range.cache, name):  # else it is a field of the other kind of cache
        cache = replace(template.range.cache, **{name: value})
        found = replace(template, range=replace(template.range, cache=cache))
    return found
