"""What runs did, step by step: a row of three panels for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddit_rt.lab.measure.figures import GREY, new_figure, size_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Steps = Sequence[Mapping[str, Any]]
"""The entry `steps` of `RunTrace.to_dict`."""

REUSED_ALPHA = 0.35
"""Of the colour of a step that reused."""

_MARKERS = {"2p": "o", "4p": "^"}
_TITLES = ("patch size of each step", "score (line) and threshold (dashed)", "time per step, ms")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A row.

    Attributes:
        label: Lines beside it.
        steps: What it did.
    """

    label: str
    steps: Steps


def draw_runs(runs: Sequence[Run], *, width: float = 15.0, labels: float = 2.0) -> Figure:
    """Draws runs below each other, on the same axes.

    Three panels for each: patch size of every step, pale where the step reused; its scores (solid)
    and thresholds (dashed) on a log axis; its time.

    Args:
        runs: At least one.
        width: Of the figure, in inches.
        labels: Of it, left of the panels.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    height = 1.15 * len(runs) + 1.3
    figure = new_figure((width, height))
    grid = figure.subplots(len(runs), 3, sharex=True, squeeze=False, width_ratios=(1.25, 1, 1))
    figure.subplots_adjust(
        left=labels / width,
        right=1 - 0.225 / width,
        top=1 - 0.85 / height,
        bottom=0.5 / height,
        hspace=0.22,
        wspace=0.17,
    )
    every = [step for run in runs for step in run.steps]
    longest, limits = max(step["latency_ms"] for step in every), _score_range(every)
    most = max(step["step"] for step in every) + 1
    for row, run in zip(grid, runs, strict=True):
        _draw_sizes(row[0], run, most, 72 * width * row[0].get_position().width / most)
        _draw_scores(row[1], run.steps, limits)
        _draw_times(row[2], run.steps, longest)
    for axes, title in zip(grid[0], _TITLES, strict=True):
        axes.set_title(title, fontsize=11, pad=6)
    for axes in grid[-1]:
        axes.set_xlabel("denoising step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    _draw_legend(figure, every)
    return figure


def _draw_sizes(axes: Axes, run: Run, most: int, cell: float) -> None:
    fontsize = min(8.0, 0.6 * cell)
    for step in run.steps:
        size, place = step["patch_size"], step["step"]
        reused = bool(step.get("reused"))
        alpha = REUSED_ALPHA if reused else 1.0
        axes.bar(place, 1, width=0.94, color=size_colour(size), alpha=alpha)
        colour = "white" if size == "p" and not reused else "black"
        style: dict[str, Any] = {"color": colour, "fontsize": fontsize, "weight": "bold"}
        axes.text(place, 0.5, size, ha="center", va="center", **style)
    axes.set_xlim(-0.6, most - 0.4)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    place_of: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "center"}
    axes.text(-0.02, 0.5, run.label, **place_of, fontsize=9)


def _score_range(steps: Steps) -> tuple[float, float]:
    """Limits of the log axis, the same for every run so that rows can be compared."""
    values = [
        value
        for step in steps
        for name, tau in step["thresholds"].items()
        for value in (tau, step["scores"].get(name))
        if tau and value
    ]
    return (min(values) / 1.5, max(values) * 1.5) if values else (1e-4, 1e-2)


def _draw_scores(axes: Axes, steps: Steps, limits: tuple[float, float]) -> None:
    drawn = False
    for name in sorted({name for step in steps for name in step["scores"]}):
        # A size without a threshold cannot be chosen; a score of 0 has no place on a log axis.
        scored = [s for s in steps if s["scores"].get(name) and s["thresholds"].get(name)]
        if not scored:
            continue
        drawn = True
        x = [step["step"] for step in scored]
        colour = size_colour(name)
        scores = [step["scores"][name] for step in scored]
        axes.plot(x, scores, color=colour, marker=_MARKERS.get(name, "s"), markersize=3.5, lw=1.4)
        taus = [step["thresholds"][name] for step in scored]
        axes.plot(x, taus, color=colour, linestyle="--", lw=1.3)
    axes.set_yscale("log")
    axes.set_ylim(limits)
    axes.yaxis.set_minor_formatter("")
    axes.grid(visible=True, which="major", axis="y", alpha=0.3)
    axes.tick_params(labelsize=8)
    if not drawn:
        middle: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no step was scored", **middle, fontsize=9, color=GREY)


def _draw_times(axes: Axes, steps: Steps, longest: float) -> None:
    axes.bar(
        [step["step"] for step in steps],
        [step["latency_ms"] for step in steps],
        width=0.8,
        color=[size_colour(step["patch_size"]) for step in steps],
    )
    axes.set_ylim(0, longest * 1.08)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.tick_params(labelsize=8)


def _draw_legend(figure: Any, steps: Steps) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sizes = {step["patch_size"] for step in steps}
    sizes |= {name for step in steps for name, tau in step["thresholds"].items() if tau}
    handles: list[Any] = [
        Patch(color=size_colour(size), label=f"patch size {size}")
        for size in sorted(sizes, key=lambda size: (len(size), size))
    ]
    handles.append(Line2D([], [], color="black", marker="o", markersize=3.5, label="score"))
    handles.append(Line2D([], [], color="black", linestyle="--", label="threshold"))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False)
