"""The plot of `bench_quality.py`: similarity and feature distance against time, plan by plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quality_paths import LABELS, TRAINING_FREE

from ddit_rt.lab.measure.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
# Okabe and Ito's palette, told apart by colour-blind readers; markers differ too.
_STYLES: dict[str, tuple[str, str]] = {
    "fewer steps": ("#000000", "-"),
    "static": ("#E69F00", "s"),
    "dynamic, the paper's rule": ("#D55E00", "v"),
    "dynamic, default rule": ("#0072B2", "o"),
}
_PATH_STYLES = {
    "paper_untrained": ("#999999", "x"),
    TRAINING_FREE: ("#E69F00", "s"),
    "paper_trained": ("#CC79A7", "^"),
    "snr_trained": ("#009E73", "D"),
}


def draw_quality(report: Mapping[str, Any], path: Path) -> None:
    """Four panels: policies (left) and coarse steps (right), SSIM above Fréchet distance.

    Args:
        report: The results; tables that are missing leave their panels empty.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    steps = report["settings"]["steps"]
    figure = new_figure((11.0, 7.4))
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    policies, paths = _policy_series(report), _path_series(report)
    titles = (f"static and dynamic plans, {steps} steps", "coarse steps, the same static plans")
    for column, (series, title) in enumerate(zip((policies, paths), titles, strict=True)):
        panels[0][column].set_title(title, fontsize=11)
        _draw(panels[0][column], series, "ssim")
        _draw(panels[1][column], series, "frechet")
        panels[1][column].set_xlabel("time of the denoising loop, ms")
        panels[0][column].legend(fontsize=8, loc="best")
    panels[0][0].set_ylabel("SSIM to full resolution")
    panels[1][0].set_ylabel("Fréchet distance, classifier's features")
    panels[1][0].set_yscale("symlog", linthresh=1e-3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


Series = dict[str, tuple[str, str, list[Row]]]


def _policy_series(report: Mapping[str, Any]) -> Series:
    rows = report["tables"].get("static_dynamic", [])
    named = {
        "fewer steps": _fewer(report),
        "static": [row for row in rows if row["kind"] == "static"],
        "dynamic, the paper's rule": [
            row
            for row in (*rows, *report["tables"].get("tau", []))
            if row["name"].startswith(("paper_", "tau_"))
        ],
        "dynamic, default rule": [row for row in rows if row["name"].startswith("default_")],
    }
    return {name: (*_STYLES[name], found) for name, found in named.items() if found}


def _path_series(report: Mapping[str, Any]) -> Series:
    rows = report["tables"].get("adapters", [])
    series: Series = {}
    fewer = _fewer(report)
    if fewer:
        series["fewer steps"] = (*_STYLES["fewer steps"], fewer)
    for name, style in _PATH_STYLES.items():
        found = [row for row in rows if row["name"].endswith(f"/{name}")]
        if found:
            series[LABELS[name]] = (*style, found)
    return series


def _fewer(report: Mapping[str, Any]) -> list[Row]:
    """Fewer steps of the main step count, from all tables, each once."""
    steps = report["settings"]["steps"]
    rows = {
        row["name"]: row
        for table in report["tables"].values()
        for row in table
        if row["kind"] == "fewer_steps" and row["reference_steps"] == steps
    }
    return list(rows.values())


def _draw(axes: Axes, series: Series, value: str) -> None:
    for label, (colour, marker, rows) in series.items():
        points = sorted(_points(rows, value))
        x = [point[0] for point in points]
        y = [point[1] for point in points]
        if marker == "-":
            axes.plot(x, y, color=colour, marker=".", lw=1.2, label=label)
            continue
        axes.plot(x, y, color=colour, marker=marker, lw=0, label=label)
        if value == "ssim":
            spread = [(y - low, high - y) for _, y, low, high in points]
            errors = list(zip(*spread, strict=True))
            axes.errorbar(x, y, yerr=errors, color=colour, fmt="none", lw=1)
    axes.grid(visible=True, alpha=0.3)


def _points(rows: list[Row], value: str) -> Iterator[tuple[float, float, float, float]]:
    """Time, value, and the interval's ends."""
    for row in rows:
        if value == "ssim":
            ssim = row["ssim"]
            yield row["loop_ms"], ssim["value"], ssim["low"], ssim["high"]
        else:
            yield row["loop_ms"], row[value], row[value], row[value]
