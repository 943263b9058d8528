"""`grid.png`: the same prompts and seeds, one row per plan."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.lab.measure.timing import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL, _LABEL, _CAPTION, _GAP = 1.55, 2.0, 0.55, 0.05
"""Inches: side of a picture, width of the row labels, height of the captions, white space."""


def draw_grid(
    report: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], path: Path
) -> None:
    """Draws the pictures of diffusers and of every plan.

    Args:
        report: The demo's report.
        pictures: Per row name (`"diffusers"`, then the plans), one picture per prompt.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    prompts = report["settings"]["prompts"]
    entries = {"diffusers": report["reference"]}
    entries |= {entry["policy"]: entry for entry in report["runs"]}
    size = (_LABEL + len(prompts) * _CELL, _CAPTION + len(entries) * _CELL)
    figure = new_figure(size)
    for column, prompt in enumerate(prompts):
        _caption(figure, size, column, prompt)
    for row, (name, entry) in enumerate(entries.items()):
        _row_label(figure, size, row, entry)
        for column, picture in enumerate(pictures[name]):
            axes = _cell(figure, size, row, column)
            axes.imshow(picture, interpolation="lanczos")
            if name not in ("diffusers", "fine"):
                _badge(axes, entry["prompts"][column])
    figure.savefig(path, dpi=150)


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty white figure of `size` inches, without pyplot's global state.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo's pictures need matplotlib ({error}); pip install 'ddit_rt[demo]'"
        ) from error
    return Figure(figsize=size, facecolor="white")


def _cell(figure: Figure, size: tuple[float, float], row: int, column: int) -> Axes:
    width, height = size
    left = _LABEL + column * _CELL
    bottom = height - _CAPTION - (row + 1) * _CELL
    side = _CELL - _GAP
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    axes.set_axis_off()
    return axes


def _caption(figure: Figure, size: tuple[float, float], column: int, prompt: str) -> None:
    width, height = size
    figure.text(
        (_LABEL + column * _CELL + (_CELL - _GAP) / 2) / width,
        (height - _CAPTION / 2) / height,
        textwrap.fill(prompt, 18),
        ha="center",
        va="center",
        fontsize=9,
    )


def _row_label(
    figure: Figure, size: tuple[float, float], row: int, entry: Mapping[str, Any]
) -> None:
    width, height = size
    middle = (height - _CAPTION - (row + 0.5) * _CELL) / height
    left = 0.12 / width
    figure.text(left, middle + 0.28 / height, entry["label"], fontsize=13, weight="bold")
    for line, text in enumerate(_facts(entry)):
        figure.text(left, middle + (0.05 - 0.19 * line) / height, text, fontsize=9.5)


def _facts(entry: Mapping[str, Any]) -> list[str]:
    """What a row's label says below its name."""
    seconds = f"{entry['seconds_denoise']:.3f} s denoising"
    if "speedup_denoise" not in entry:
        return [seconds, "reference of speed-up"]
    speed = f"speed-up {entry['speedup_denoise']:.2f}x"
    if entry["policy"] == "fine":
        return [seconds, speed, "reference of SSIM"]
    return [seconds, speed, f"SSIM {entry['ssim']:.3f}"]


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
