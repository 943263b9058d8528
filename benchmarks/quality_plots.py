"""The plots of `bench_quality.py` and `bench_study.py`: plans by closeness and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quality_rows import Row
from study_plans import DDIT, FEWER, FIRST, FIXED, MAG, MIXED, PLANNED, SEA, SPECTRAL, STATIC

from ddit_rt.lab.measure.figures import (
    BLACK,
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by markers, too.
_KINDS = {
    FEWER: ("fewer steps", BLACK, "x"),
    STATIC: ("static coarse steps", ORANGE, "s"),
    MIXED: ("mixed steps", YELLOW, "h"),
    SPECTRAL: ("SPEED's rule", SKY, "P"),
    DDIT: ("DDiT", BLUE, "o"),
    MAG: ("MagCache", PINK, "^"),
    FIXED: ("StaticCache, extrapolating", GREY, "v"),
    SEA: ("SeaCache, extrapolating", GREEN, "D"),
    FIRST: ("FirstBlockCache", BROWN, "<"),
    PLANNED: ("planner", RED, "*"),
}


def draw_order(name: str, entry: Mapping[str, Any], path: Path) -> None:
    """PSNR to all steps against the share of the cost, a line for each kind of plan.

    Args:
        name: Of the setting.
        entry: What the section `order` says of it.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    figure = new_figure((9.2, 4.4))
    panel = figure.subplots()
    rows = [row for level in entry["levels"].values() for row in level]
    for kind, (label, colour, marker) in _KINDS.items():
        points = [(100 * row["share"], row["psnr"]) for row in rows if row["kind"] == kind]
        _draw(panel, points, label=label, color=colour, marker=marker, capsize=3)
    panel.axhline(entry["two_seeds"]["psnr"]["value"], color="#bbbbbb", linestyle=":")
    unit = "computed image tokens" if entry["unit"] == "tokens" else "time of the loop"
    panel.set_xlabel(f"{unit}, % of all steps at full resolution")
    panel.set_ylabel("PSNR to that image, dB (dotted: two seeds)")
    panel.set_title(
        f"{name}: {len(entry['prompts'])} prompts x {entry['seeds']} seeds", fontsize=11
    )
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(figure, path)


def draw_quality(report: Mapping[str, Any], path: Path) -> None:
    """SSIM above Fréchet distance, by the time of the loop, of every kind of plan.

    Args:
        report: The results.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    figure = new_figure((6.3, 7.4))
    above, below = figure.subplots(2, 1, sharex=True)
    steps, tables = report["settings"]["steps"], report["tables"]
    rows = tables.get("static_dynamic", [])
    fewer = {
        row["name"]: row
        for row in (row for table in tables.values() for row in table)
        if row["kind"] == "fewer_steps" and row["reference_steps"] == steps
    }
    rules = [*rows, *tables.get("tau", [])]
    for label, colour, line, marker, own in (
        ("fewer steps", BLACK, "-", ".", fewer.values()),
        ("static", ORANGE, "none", "s", [row for row in rows if row["kind"] == "static"]),
        ("dynamic, the paper's rule", RED, "none", "v", _named(rules, "paper_", "tau_")),
        ("dynamic, default rule", BLUE, "none", "o", _named(rows, "default_")),
    ):
        style = {"label": label, "color": colour, "linestyle": line, "marker": marker}
        _draw(above, [(row["loop_ms"], row["ssim"]) for row in own], **style)
        _draw(below, [(row["loop_ms"], {"value": row["frechet"]}) for row in own], **style)
    above.set_title(f"static and dynamic plans, {steps} steps", fontsize=11)
    above.legend(fontsize=8, loc="lower right")
    above.set_ylabel("SSIM to full resolution")
    below.set_xlabel("time of the denoising loop, ms")
    below.set_ylabel("Fréchet distance, classifier's features")
    below.set_yscale("symlog", linthresh=1e-3)
    for axes in (above, below):
        axes.grid(visible=True, alpha=0.3)
    _save(figure, path)


def _named(rows: Iterable[Row], *starts: str) -> list[Row]:
    return [row for row in rows if row["name"].startswith(starts)]


def _draw(axes: Axes, points: Sequence[tuple[float, Mapping[str, float]]], **style: Any) -> None:
    """Values, each with its interval if it has one, by what they cost."""
    if not points:
        return
    points = sorted(points, key=lambda point: point[0])
    reach = [
        [abs(entry.get(end, entry["value"]) - entry["value"]) for _, entry in points]
        for end in ("low", "high")
    ]
    x, y = [cost for cost, _ in points], [entry["value"] for _, entry in points]
    axes.errorbar(x, y, yerr=reach, **style)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
