"""The plots of the report as inline SVG: quality against time, and patch sizes step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

PALETTE = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Okabe and Ito's, told apart by colour-blind readers too; grey for the first, the reference."""

SIZE_COLOURS = {"p": "#0072B2", "2p": "#E69F00", "4p": "#009E73"}
_OTHER_SIZE = "#CC79A7"

_WIDTH, _HEIGHT = 460.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 24.0, 42.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A plan in the plot: position with its intervals, `(value, low, high)`."""

    title: str
    colour: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """A linear axis from data to the image."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
        while (self.high - self.low) / step > 6:
            step *= 2.5 if f"{step:e}".startswith("2") else 2
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step) + 1)]


def colours(plans: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each plan by name."""
    return {plan["name"]: PALETTE[i % len(PALETTE)] for i, plan in enumerate(plans)}


def marks(plans: Sequence[Mapping[str, Any]], metric: str, cost: str = "seconds") -> list[Mark]:
    """The plans that have a score, for `pareto_plot`."""
    found = []
    for plan in plans:
        score = plan["scores"].get(metric)
        if score and score["value"] is not None:
            found.append(
                Mark(
                    title=plan["title"],
                    colour=colours(plans)[plan["name"]],
                    x=_triple(plan[cost]),
                    y=_triple(score),
                )
            )
    return found


def _triple(interval: Mapping[str, float | None]) -> tuple[float, float, float]:
    """A bound that does not exist lies on the value."""
    value = interval["value"]
    assert value is not None, "the caller left plans without a value out"
    low, high = interval.get("low"), interval.get("high")
    return value, value if low is None else low, value if high is None else high


def pareto_plot(
    points: Sequence[Mark], *, x_label: str, y_label: str, higher_is_better: bool
) -> str:
    """Quality against cost with 95% intervals, and the front: what no other plan beats in both.

    Args:
        points: At least one.
        x_label: Of the cost, of which less is better.
        y_label: Of the score.
        higher_is_better: Direction of the score.
    """
    x = _axis([v for p in points for v in p.x], _LEFT, _WIDTH - _RIGHT)
    y = _axis([v for p in points for v in p.y], _HEIGHT - _BOTTOM, _TOP)
    named = f"{escape(y_label)} against {escape(x_label)}"
    middle = (x.start + x.end) / 2
    parts = [
        *_grid(x, y),
        _front_line(points, x, y, higher_is_better=higher_is_better),
        *(_point(point, x, y) for point in points),
        *_labels(points, x, y),
        f'<text x="{middle:g}" y="{_HEIGHT - 6:g}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="4" y="{_TOP - 4:g}">{escape(y_label)}</text>',
    ]
    size = f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}"'
    return f'<svg class="plot" {size} role="img" aria-label="{named}">{"".join(parts)}</svg>'


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    return _Axis(low=low - room, high=high + room, start=start, end=end)


def _grid(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for tick in x.ticks():
        at = f"{x.at(tick):.1f}"
        parts.append(f'<path class="grid" d="M{at} {y.start:g}V{y.end:g}"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{y.start + 16:g}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in y.ticks():
        at = f"{y.at(tick):.1f}"
        parts.append(f'<path class="grid" d="M{x.start:g} {at}H{x.end:g}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 6:g}" y="{at}" dy="4" '
            f'text-anchor="end">{tick:g}</text>'
        )
    return parts


def front(points: Sequence[Mark], *, higher_is_better: bool) -> list[Mark]:
    """Points that none beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    found: list[Mark] = []
    for point in sorted(points, key=lambda point: (point.x[0], -sign * point.y[0])):
        if not found or sign * point.y[0] > sign * found[-1].y[0]:
            found.append(point)
    return found


def _front_line(points: Sequence[Mark], x: _Axis, y: _Axis, *, higher_is_better: bool) -> str:
    found = front(points, higher_is_better=higher_is_better)
    steps = [f"M{x.at(found[0].x[0]):.1f} {y.at(found[0].y[0]):.1f}"]
    steps += [f"H{x.at(point.x[0]):.1f}V{y.at(point.y[0]):.1f}" for point in found[1:]]
    return f'<path class="front" d="{"".join(steps)}"/>'


def _point(point: Mark, x: _Axis, y: _Axis) -> str:
    cx, cy = x.at(point.x[0]), y.at(point.y[0])
    bars = (
        f"M{x.at(point.x[1]):.1f} {cy:.1f}H{x.at(point.x[2]):.1f}"
        f"M{cx:.1f} {y.at(point.y[1]):.1f}V{y.at(point.y[2]):.1f}"
    )
    return (
        f'<path d="{bars}" stroke="{point.colour}" stroke-width="1.5"/>'
        f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{point.colour}">'
        f"<title>{escape(point.title)}</title></circle>"
    )


def _labels(points: Sequence[Mark], x: _Axis, y: _Axis) -> list[str]:
    """Names beside the points, moved down where they would lie on each other."""
    parts, last = [], -math.inf
    for point in sorted(points, key=lambda point: y.at(point.y[0])):
        cx, cy = x.at(point.x[0]), max(y.at(point.y[0]) - 7, last + 14)
        last = cy
        right = cx > (x.start + x.end) / 2
        anchor, shift = ("end", -9) if right else ("start", 9)
        parts.append(
            f'<text x="{cx + shift:.1f}" y="{cy:.1f}" text-anchor="{anchor}">'
            f"{escape(point.title)}</text>"
        )
    return parts


def timeline(patch_sizes: Sequence[str]) -> str:
    """Patch size of every step: a bar each, the taller the more tokens, and the colour."""
    counts = ", ".join(f"{patch_sizes.count(size)} at {size}" for size in sorted(set(patch_sizes)))
    bars = []
    for step, size in enumerate(patch_sizes):
        height = 100 / math.sqrt(_multiple(size))
        colour = SIZE_COLOURS.get(size, _OTHER_SIZE)
        bars.append(
            f'<rect x="{step + 0.06:g}" y="{100 - height:.1f}" width=".88" height="{height:.1f}" '
            f'fill="{colour}"><title>step {step}: {escape(size)}</title></rect>'
        )
    return (
        f'<svg class="timeline" viewBox="0 0 {len(patch_sizes)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{len(patch_sizes)} steps: {escape(counts)}">{"".join(bars)}</svg>'
    )


def _multiple(size: str) -> int:
    return int(size.removesuffix("p") or 1)
