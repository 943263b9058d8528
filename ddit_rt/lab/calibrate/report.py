"""What a calibration leaves behind: a JSON file, the Pareto front as an image, and a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddit_rt.artifact import Calibration
from ddit_rt.lab.measure import figures
from ddit_rt.lab.measure.report import write_json
from ddit_rt.lab.plans.candidates import ADAPTIVE, CACHED, COMBINED, DYNAMIC, FINE, STATIC, STEPS
from ddit_rt.lab.plans.points import Point

SCHEMA_VERSION = 2
"""Version 2 added step caches, and has the baselines of each adaptive plan under its kind."""

_STYLES = {
    FINE: ("full resolution", figures.BLACK, "*"),
    STEPS: ("fewer steps", figures.BLUE, "s"),
    STATIC: ("static plans", figures.ORANGE, "^"),
    CACHED: ("full resolution with {caches}", figures.RED, "D"),
    DYNAMIC: ("dynamic plans", figures.GREEN, "o"),
    COMBINED: ("dynamic plans with {caches}", figures.SKY, "P"),
}


def write_report(calibration: Calibration, points: Sequence[Point], folder: Path) -> list[Path]:
    """Writes `calibration-N.json` and `pareto-N.png` for N steps.

    The JSON is the artifact's record, with the policy of every candidate added. A plan names its
    step cache, `step_cache`, and has it in its label.

    Args:
        calibration: The record.
        points: Every plan that was measured.
        folder: Folder that the files go to; it is made.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = calibration.num_inference_steps
    data = {"schema_version": SCHEMA_VERSION, **asdict(calibration)}
    data["policies"] = [point.candidate.policy.to_dict() for point in points]
    record, image = folder / f"calibration-{steps}.json", folder / f"pareto-{steps}.png"
    write_json(record, data)
    draw_front(calibration, image)
    return [record, image]


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
        label = name.format(caches=_caches(row))
        axes.scatter(x, y, s=28, color=colour, marker=marker, label=label, alpha=0.8, zorder=3)
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
    axes.set_ylabel(_similarity(calibration.evidence))
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if tick <= max(x) * 1.1]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _similarity(evidence: Mapping[str, Any]) -> str:
    frames = ", mean over the frames" if evidence["makes"] == "video" else ""
    return f"{evidence['measure']['name']} to full resolution{frames}"


def _caches(candidates: Sequence[dict[str, Any]]) -> str:
    """Names of their step caches."""
    caches = [entry["step_cache"] for entry in candidates]
    return " or ".join(sorted({cache["step_cache"] for cache in caches if cache is not None}))


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
        *(_row(kind, entry) for kind, entry in evidence["held_out"].items()),
    ]
    for plan in (kind for kind in ADAPTIVE if kind in evidence["at_equal_cost"]):
        lines.append(f"baselines at the cost that the {plan} plan has there")
        for kind, entry in evidence["at_equal_cost"][plan].items():
            share = evidence["closer_on"][plan][kind]
            lines.append(
                f"{_row(kind, entry)}  {plan} is more similar on {share:.0%} of the prompts"
            )
    if evidence["winner_is_closer_than_static_on"] is not None:
        share = evidence["winner_is_closer_than_static_on"]
        lines.append(
            f"the winner is more similar than the static plan of its cost on {share:.0%} of them"
        )
        lines.append(_row("static", evidence["static_at_the_winners_cost"]))
    lines.append(f"presets, on the {len(evidence['prompts'])} calibration prompts")
    lines += [_row(name, asdict(plan)) for name, plan in calibration.presets.items()]
    return "\n".join(lines)


def _row(name: str, entry: dict[str, Any]) -> str:
    psnr = "same" if entry["psnr"] is None else f"{entry['psnr']:.1f}"
    return (
        f"  {name:<9}{entry['cost']:>9.1f}{entry['speedup']:>9.2f}x{entry['ssim']:>16.4f}{psnr:>6}"
        f"  {entry['label']}"
    )
