"""What a calibration leaves behind: a JSON file, the Pareto front as a picture and a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddit_rt.artifact import Calibration
from ddit_rt.lab.measure import figures
from ddit_rt.lab.measure.report import write_json, write_whole
from ddit_rt.lab.plans.candidates import CACHED, COMBINED, DYNAMIC, FINE, STATIC, STEPS

SCHEMA_VERSION = 3
"""Version 3 has the best plan of each kind under `held_out`, and each candidate's plan in it."""

_STYLES = {
    FINE: ("full resolution", figures.BLACK, "*"),
    STEPS: ("fewer steps", figures.BLUE, "s"),
    STATIC: ("static plans", figures.ORANGE, "^"),
    CACHED: ("steps at p with a cache", figures.RED, "D"),
    DYNAMIC: ("dynamic plans", figures.GREEN, "o"),
    COMBINED: ("coarse steps with a cache", figures.SKY, "P"),
}


def write_report(calibration: Calibration, folder: Path) -> list[Path]:
    """Writes `calibration-N.json`, `pareto-N.png` and `front-N.md` for N steps.

    Args:
        calibration: The record.
        folder: Folder that the files go to; it is made.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = calibration.num_inference_steps
    record, image = folder / f"calibration-{steps}.json", folder / f"pareto-{steps}.png"
    table = folder / f"front-{steps}.md"
    write_json(record, {"schema_version": SCHEMA_VERSION, **asdict(calibration)})
    draw_front(calibration, image)
    write_whole(table, front_table(calibration, image.name).encode())
    return [record, image, table]


def front_table(calibration: Calibration, image: str) -> str:
    """The front as Markdown, the presets marked.

    Args:
        calibration: The record.
        image: Name of the picture's file.
    """
    names, unit = calibration.evidence["measure"], calibration.cost_unit
    presets = calibration.presets.items()
    lines = [
        f"# {calibration.num_inference_steps} steps: {calibration.evidence['verdict']}",
        "",
        f"![the front]({image})",
        "",
        f"| {unit} | speed-up | {names['name']} | {names['ratio']}, dB | plan | preset |",
        "|---|---|---|---|---|---|",
    ]
    for plan in calibration.front:
        chosen = ", ".join(name for name, own in presets if own == plan)
        cells = (f"{plan.cost:.1f}", f"{plan.speedup:.2f}x", f"{plan.ssim:.4f}", _psnr(plan.psnr))
        lines.append(f"| {' | '.join(cells)} | {plan.label} | {chosen} |")
    return "\n".join(lines) + "\n"


def draw_front(calibration: Calibration, path: Path) -> None:
    """Draws every candidate's speed-up and lost similarity, the front and the presets.

    Args:
        calibration: The record.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    figure = figures.new_figure((8.0, 5.0))
    axes = figure.subplots()
    candidates = calibration.evidence["candidates"]
    base = calibration.front[0].cost
    for kind, (name, colour, marker) in _STYLES.items():
        row = [entry for entry in candidates if entry["kind"] == kind]
        if not row:
            continue
        x, y = [base / entry["cost"] for entry in row], [entry["ssim"] for entry in row]
        axes.scatter(x, y, s=28, color=colour, marker=marker, label=name, alpha=0.8, zorder=3)
    front = calibration.front
    x, y = [plan.speedup for plan in front], [plan.ssim for plan in front]
    axes.step(x, y, where="pre", color=figures.PINK, lw=1.4, label="front", zorder=2)
    for name, plan in calibration.presets.items():
        axes.annotate(
            name,
            (plan.speedup, plan.ssim),
            textcoords="offset points",
            xytext=(8, 8),
            fontsize=10,
            weight="bold",
        )
    axes.set_xlabel(f"speed-up of the loop over {calibration.num_inference_steps} steps at p")
    evidence = calibration.evidence
    frames = ", mean over the frames" if evidence["makes"] == "video" else ""
    axes.set_ylabel(f"{evidence['measure']['name']} to full resolution{frames}")
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if tick <= max(x) * 1.1]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def summary(calibration: Calibration) -> str:
    """A few lines for a terminal."""
    evidence, unit = calibration.evidence, calibration.cost_unit
    names = evidence["measure"]
    ((name, value),) = calibration.target.items()
    fine = f"{evidence['held_out_fine_cost']:.1f} {unit} per {evidence['makes']}"
    lines = [
        f"{calibration.num_inference_steps} steps, {name} {value:g}: {evidence['verdict']}",
        f"on {len(evidence['held_out_prompts'])} held-out prompts; full resolution takes {fine}",
        f"  {'plan':<9}{unit:>9}{'speed-up':>10}{names['name']:>16}{names['ratio']:>6}",
        *_held_out(evidence),
        f"{evidence['plans_tried']} plans tried in {evidence['pictures']['total']} generations",
        f"presets, on the {len(evidence['prompts'])} calibration prompts",
        *(_row(name, asdict(plan)) for name, plan in calibration.presets.items()),
    ]
    return "\n".join(lines)


def _held_out(evidence: Mapping[str, Any]) -> list[str]:
    winner, closer = evidence["winner"], evidence["closer_on"]
    told = {winner: "  <- taken"}
    told |= {kind: f"  {winner} is more similar on {x:.0%}" for kind, x in closer.items()}
    return [f"{_row(kind, entry)}{told[kind]}" for kind, entry in evidence["held_out"].items()]


def _row(name: str, entry: Mapping[str, Any]) -> str:
    return (
        f"  {name:<9}{entry['cost']:>9.1f}{entry['speedup']:>9.2f}x{entry['ssim']:>16.4f}"
        f"{_psnr(entry['psnr']):>6}  {entry['label']}"
    )


def _psnr(psnr: float | None) -> str:
    return "same" if psnr is None else f"{psnr:.1f}"
