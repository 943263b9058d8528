"""The plot of `bench_study.py`: how close every kind of plan comes, by what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study_plans import DDIT, FEWER, FIXED, MAG, MIXED, PLANNED, SEA, SPECTRAL, STATIC

from ddit_rt.lab.measure.figures import new_figure

# Okabe and Ito's palette, told apart by colour-blind readers; markers differ too.
_STYLES = {
    FEWER: ("fewer steps", "#000000", "x"),
    STATIC: ("static coarse steps", "#E69F00", "s"),
    MIXED: ("mixed steps", "#F0E442", "h"),
    SPECTRAL: ("SPEED's rule", "#56B4E9", "P"),
    DDIT: ("DDiT", "#0072B2", "o"),
    MAG: ("MagCache", "#CC79A7", "^"),
    FIXED: ("StaticCache, extrapolating", "#999999", "v"),
    SEA: ("SeaCache, extrapolating", "#009E73", "D"),
    PLANNED: ("planner", "#D55E00", "*"),
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
    for kind, (label, colour, marker) in _STYLES.items():
        own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["share"])
        if not own:
            continue
        values = [row["psnr"]["value"] for row in own]
        reach = [
            [abs(row["psnr"][end] - row["psnr"]["value"]) for row in own] for end in ("low", "high")
        ]
        panel.errorbar(
            [100 * row["share"] for row in own],
            values,
            yerr=reach,
            label=label,
            color=colour,
            marker=marker,
            capsize=3,
        )
    panel.axhline(entry["two_seeds"]["psnr"]["value"], color="#bbbbbb", linestyle=":")
    unit = "computed image tokens" if entry["unit"] == "tokens" else "time of the loop"
    panel.set_xlabel(f"{unit}, % of all steps at full resolution")
    panel.set_ylabel("PSNR to that image, dB (dotted: two seeds)")
    panel.set_title(
        f"{name}: {len(entry['prompts'])} prompts x {entry['seeds']} seeds", fontsize=11
    )
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
