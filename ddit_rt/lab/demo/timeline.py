"""`timeline.png`: what the dynamic policy decided, step by step, and what each step took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.lab.measure.grid import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers too. Sizes are also written out.
COLOURS = {"p": "#0072B2", "2p": "#E69F00", "4p": "#009E73"}
_OTHER = "#CC79A7"
_REUSED_ALPHA = 0.35
_MARKERS = {"2p": "o", "4p": "^"}


def draw_timeline(report: Mapping[str, Any], path: Path) -> None:
    """Draws the dynamic run of every prompt, plain pictures first.

    Three panels per prompt: patch size of every step, pale where the step reused; its scores
    (solid) and thresholds (dashed) on a log axis; its time.

    Args:
        report: The demo's report.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    (run,) = (entry for entry in report["runs"] if entry["policy"] == "dynamic")
    prompts = sorted(run["prompts"], key=lambda entry: is_textured(entry["prompt"]))
    height = 1.15 * len(prompts) + 1.3
    figure = new_figure((15.0, height))
    grid = figure.subplots(len(prompts), 3, sharex=True, squeeze=False, width_ratios=(1.25, 1, 1))
    top, bottom = 1 - 0.85 / height, 0.5 / height
    figure.subplots_adjust(
        left=0.135, right=0.985, top=top, bottom=bottom, hspace=0.22, wspace=0.17
    )
    every = [step for entry in prompts for step in entry["trace"]["steps"]]
    longest, limits = max(step["latency_ms"] for step in every), _score_range(every)
    for row, entry in zip(grid, prompts, strict=True):
        steps = entry["trace"]["steps"]
        _draw_sizes(row[0], entry, steps)
        _draw_scores(row[1], steps, limits)
        _draw_times(row[2], steps, longest)
    titles = ("patch size of each step", "score (line) and threshold (dashed)", "time per step, ms")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11, pad=6)
    for axes in grid[-1]:
        axes.set_xlabel("denoising step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    _draw_legend(figure, prompts)
    figure.savefig(path, dpi=130)


def is_textured(prompt: str) -> bool:
    """Whether a caption of the demo names a background with a texture."""
    words = prompt.split()
    return "plain" not in words and "fade" not in words


def _draw_sizes(axes: Axes, entry: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    for step in steps:
        size, place = step["patch_size"], step["step"]
        reused = bool(step.get("reused"))
        alpha = _REUSED_ALPHA if reused else 1.0
        axes.bar(place, 1, width=0.94, color=COLOURS.get(size, _OTHER), alpha=alpha)
        colour = "white" if size == "p" and not reused else "black"
        style: dict[str, Any] = {"color": colour, "fontsize": 8, "weight": "bold"}
        axes.text(place, 0.5, size, ha="center", va="center", **style)
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.text(
        -0.02,
        0.5,
        f"{_two_lines(entry['prompt'])}\n{entry['tokens']} tokens, SSIM {entry['ssim']:.3f}",
        transform=axes.transAxes,
        ha="right",
        va="center",
        fontsize=9,
    )


def _two_lines(prompt: str) -> str:
    subject, on, ground = prompt.partition(" on ")
    return f"{subject}\n{on.strip()} {ground}" if on else prompt


def _score_range(steps: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Limits of the log axis, the same for every prompt so that rows can be compared."""
    values = [
        value
        for step in steps
        for name, tau in step["thresholds"].items()
        for value in (tau, step["scores"].get(name))
        if tau and value
    ]
    return (min(values) / 1.5, max(values) * 1.5) if values else (1e-4, 1e-2)


def _draw_scores(
    axes: Axes, steps: Sequence[Mapping[str, Any]], limits: tuple[float, float]
) -> None:
    for name in sorted({name for step in steps for name in step["scores"]}):
        # A size without a threshold cannot be chosen; a score of 0 has no place on a log axis.
        scored = [s for s in steps if s["scores"].get(name) and s["thresholds"].get(name)]
        if not scored:
            continue
        x = [step["step"] for step in scored]
        colour = COLOURS.get(name, _OTHER)
        scores = [step["scores"][name] for step in scored]
        axes.plot(x, scores, color=colour, marker=_MARKERS.get(name, "s"), markersize=3.5, lw=1.4)
        taus = [step["thresholds"][name] for step in scored]
        axes.plot(x, taus, color=colour, linestyle="--", lw=1.3)
    axes.set_yscale("log")
    axes.set_ylim(limits)
    axes.yaxis.set_minor_formatter("")
    axes.grid(visible=True, which="major", axis="y", alpha=0.3)
    axes.tick_params(labelsize=8)


def _draw_times(axes: Axes, steps: Sequence[Mapping[str, Any]], longest: float) -> None:
    axes.bar(
        [step["step"] for step in steps],
        [step["latency_ms"] for step in steps],
        width=0.8,
        color=[COLOURS.get(step["patch_size"], _OTHER) for step in steps],
    )
    axes.set_ylim(0, longest * 1.08)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.tick_params(labelsize=8)


def _draw_legend(figure: Any, prompts: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    steps = [step for entry in prompts for step in entry["trace"]["steps"]]
    sizes = {step["patch_size"] for step in steps}
    sizes |= {name for step in steps for name, tau in step["thresholds"].items() if tau}
    handles: list[Any] = [
        Patch(color=COLOURS.get(size, _OTHER), label=f"patch size {size}")
        for size in sorted(sizes, key=lambda size: (len(size), size))
    ]
    handles.append(Line2D([], [], color="black", marker="o", markersize=3.5, label="score"))
    handles.append(Line2D([], [], color="black", linestyle="--", label="threshold"))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False)
