"""Figures of the demo: a grid with one row per plan, and `timeline.png`.

The grid is `grid.png` of images, and every frame of `clips.mp4` of videos. The timeline shows what
the dynamic policy decided, step by step, and what each step took.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddit_rt.lab.demo.plans import FINE
from ddit_rt.lab.demo.report import REFERENCE
from ddit_rt.lab.measure.figures import new_figure
from ddit_rt.lab.measure.timeline import Run, draw_runs
from ddit_rt.lab.measure.timing import Pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_CELL, _LABEL, _CAPTION, _GAP = 1.55, 2.0, 0.55, 0.05
"""Inches: side of an image, width of the row labels, height of the captions, white space."""

_VIDEO_DPI, _BLOCK = 128, 16
"""Pixels per inch of a video, and what its sides divide by."""


def draw_grid(report: Mapping[str, Any], made: Mapping[str, Sequence[Pixels]], path: Path) -> None:
    """Draws the images of diffusers and of every plan.

    Args:
        report: The demo's report.
        made: One image per prompt, by the name of the plan and of `REFERENCE`.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    figure, _ = _grid(report, made)
    figure.savefig(path, dpi=150)


def grid_frames(
    report: Mapping[str, Any], made: Mapping[str, Sequence[Pixels]], *, loops: int = 3
) -> list[Pixels]:
    """The same of videos `[F, H, W, 3]`, frame by frame.

    Args:
        report: The demo's report.
        made: One video per prompt, by the name of the plan and of `REFERENCE`.
        loops: How often the videos are repeated.

    Returns:
        `loops` x F frames, whose sides are multiples of 16.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, shown = _grid(report, {name: [v[0] for v in row] for name, row in made.items()})
    figure.set_dpi(_VIDEO_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    frames: list[Pixels] = []
    for index in range(len(made[FINE][0])):
        for (name, column), image in shown.items():
            image.set_data(made[name][column][index])
        canvas.draw()
        frame = np.asarray(canvas.buffer_rgba())[..., :3]
        missing = [-side % _BLOCK for side in frame.shape[:2]]
        frames.append(np.pad(frame, [*((0, n) for n in missing), (0, 0)], constant_values=255))
    return frames * loops


def _grid(
    report: Mapping[str, Any], made: Mapping[str, Sequence[Pixels]]
) -> tuple[Figure, dict[tuple[str, int], AxesImage]]:
    """The figure, and its images by row and column."""
    prompts = report["settings"]["prompts"]
    entries = {REFERENCE: report["reference"]}
    entries |= {entry["policy"]: entry for entry in report["runs"]}
    width, height = _LABEL + len(prompts) * _CELL, _CAPTION + len(entries) * _CELL
    figure = new_figure((width, height))
    grid = figure.subplots(len(entries), len(prompts), squeeze=False)
    share = _GAP / _CELL
    figure.subplots_adjust(
        left=_LABEL / width,
        right=1,
        bottom=0,
        top=1 - _CAPTION / height,
        wspace=share,
        hspace=share,
    )
    shown = {}
    for axes, prompt in zip(grid[0], prompts, strict=True):
        axes.set_title(textwrap.fill(prompt, 18), fontsize=9)
    for cells, (name, entry) in zip(grid, entries.items(), strict=True):
        _label_row(cells[0], entry)
        for column, axes in enumerate(cells):
            axes.set_axis_off()
            shown[name, column] = axes.imshow(made[name][column], interpolation="lanczos")
            if name not in (REFERENCE, FINE):
                _badge(axes, entry["prompts"][column])
    return figure, shown


def _label_row(axes: Axes, entry: Mapping[str, Any]) -> None:
    """Says what a row shows, left of its first image."""
    facts = [f"{entry['seconds_denoise']:.3f} s denoising"]
    if "speedup_denoise" not in entry:
        facts.append("reference of speed-up")
    else:
        facts.append(f"speed-up {entry['speedup_denoise']:.2f}x")
        is_reference = entry["policy"] == FINE
        facts.append("reference of SSIM" if is_reference else f"SSIM {entry['ssim']:.3f}")
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    left = (0.12 - _LABEL) * 72
    title: dict[str, Any] = {"fontsize": 13, "weight": "bold", "va": "bottom"}
    axes.annotate(entry["label"], (0, 0.5), xytext=(left, 14), **place, **title)
    axes.annotate("\n".join(facts), (0, 0.5), xytext=(left, 9), **place, fontsize=9.5, va="top")


def _badge(axes: Axes, prompt: Mapping[str, Any]) -> None:
    axes.text(
        0.03,
        0.03,
        f"SSIM {prompt['ssim']:.2f}",
        transform=axes.transAxes,
        fontsize=7.5,
        va="bottom",
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )


def draw_timeline(report: Mapping[str, Any], path: Path) -> None:
    """Draws the dynamic run of every prompt, plain images first.

    See `lab.measure.timeline`.

    Args:
        report: The demo's report.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    (run,) = (entry for entry in report["runs"] if entry["policy"] == "dynamic")
    prompts = sorted(run["prompts"], key=lambda entry: is_textured(entry["prompt"]))
    runs = [
        Run(
            label=f"{_two_lines(entry['prompt'])}\n{entry['tokens']} tokens, "
            f"SSIM {entry['ssim']:.3f}",
            steps=entry["trace"]["steps"],
        )
        for entry in prompts
    ]
    draw_runs(runs).savefig(path, dpi=130)


def is_textured(prompt: str) -> bool:
    """Whether a caption of the demo names a background with a texture."""
    words = prompt.split()
    return "plain" not in words and "fade" not in words


def _two_lines(prompt: str) -> str:
    subject, on, ground = prompt.partition(" on ")
    return f"{subject}\n{on.strip()} {ground}" if on else prompt
