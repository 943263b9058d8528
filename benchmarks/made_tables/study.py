"""The tables of docs/quality.md from records of `bench_study.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from made_tables.markdown import Report, block, cpu, interval, label, released, table

NAMES = {
    "fewer_steps": "fewer steps",
    "magcache": "MagCache",
    "seacache": "SeaCache",
    "first_block_cache": "FirstBlockCache",
    "static_cache": "StaticCache",
    "static": "a static plan",
    "mixed": "mixed steps",
    "spectral": "SPEED's rule",
    "ddit": "DDiT",
}


def study(report: Report) -> str:
    """What moves the distance of half the steps, then every kind of plan at equal cost."""
    sections = report["sections"]
    curve = _curve(sections.get("curve", {}))
    orders = [_order(name, entry) for name, entry in sections.get("order", {}).items()]
    return block(curve, *orders, [_conditions(report)])


def _curve(entries: Mapping[str, Any]) -> list[str]:
    """One line per setting: the scale, half the steps, MagCache at that cost."""
    if not entries:
        return []
    columns = ["", "two seeds, dB", "half the steps, dB (95%)", "MagCache at 2x, dB (95%)"]
    rows = []
    for name, entry in entries.items():
        by_kind = {row["kind"]: row for row in entry["levels"]["2"]}
        half, mag = by_kind["fewer_steps"], by_kind.get("magcache")
        cells = [name, _value(entry["two_seeds"]["psnr"]), interval(half["psnr"], 1)]
        found = [mag["psnr"], mag["over_fewer"]] if mag else [None, None]
        rows.append([*cells, *("" if one is None else interval(one, 1) for one in found)])
    return table([*columns, "MagCache over half the steps, dB (95%)"], rows)


def _order(name: str, entry: Mapping[str, Any]) -> list[str]:
    """One line per cost and kind of plan."""
    columns = ["cost", "plan", "share", "PSNR, dB (95%)", "SSIM (95%)"]
    columns += ["over fewer steps, dB (95%)", "Fréchet", "as asked"]
    rows = [
        _row("" if place else f"{level}x", row)
        for level in sorted(entry["levels"], key=float)
        for place, row in enumerate(entry["levels"][level])
    ]
    scale = entry["two_seeds"]
    said = f"Two seeds of one prompt: {_value(scale['psnr'])} dB, SSIM {scale['ssim']['value']:.3f}"
    whole = entry["full_resolution"]
    said += f", Fréchet distance {whole['frechet']:.3f}."
    if whole["as_asked"] is not None:
        said += f" Full resolution shows what it is asked for in {whole['as_asked']:.0%}."
    lines = [f"**{name}**", "", *table(columns, rows, "--"), "", said]
    return [*lines, *_planner(entry), *_prompt_by_prompt(entry)]


def _planner(entry: Mapping[str, Any]) -> list[str]:
    """How much faster the planner's plans are than any single technique at their closeness."""
    found = []
    for level in sorted(entry["levels"], key=float):
        rows = {row["kind"]: row for row in entry["levels"][level]}
        if "planner" not in rows:
            continue
        own = rows["planner"]
        reached = {
            kind: share
            for kind in rows
            if kind != "planner" and (share := _share_at(entry, kind, own["psnr"]["value"]))
        }
        if reached:
            kind = min(reached, key=lambda kind: reached[kind])
            least, most = reached[kind]
            found.append(
                f"{'at most ' * most}{least / own['share']:.2f}x at {level}x ({NAMES[kind]})"
            )
    if not found:
        return []
    return ["", f"The planner over the best single technique at equal PSNR: {', '.join(found)}."]


def _share_at(entry: Mapping[str, Any], kind: str, psnr: float) -> tuple[float, bool] | None:
    """The cost at which a kind of plan reaches a PSNR, by those that were measured; else None.

    Returns:
        The cost, and whether that is the least: of the cheapest plan, which is closer already.
    """
    points = sorted(
        (row["psnr"]["value"], row["share"])
        for rows in entry["levels"].values()
        for row in rows
        if row["kind"] == kind
    )
    if not points or points[-1][0] < psnr:
        return None
    if psnr <= points[0][0]:
        return points[0][1], True
    (low, cheap), (high, dear) = next(
        pair for pair in pairwise(points) if pair[0][0] <= psnr <= pair[1][0]
    )
    return float(cheap * (dear / cheap) ** ((psnr - low) / (high - low))), False


def _prompt_by_prompt(entry: Mapping[str, Any]) -> list[str]:
    """On how many prompts DDiT is closer than the static plan at its cost."""
    found = []
    for level in sorted(entry["levels"], key=float):
        rows = {row["kind"]: row["psnr_per_prompt"] for row in entry["levels"][level]}
        if {"ddit", "static"} <= rows.keys():
            closer = [a > b for a, b in zip(rows["ddit"], rows["static"], strict=True)]
            found.append(f"{sum(closer) / len(closer):.0%} at {level}x")
    if not found:
        return []
    return ["", f"DDiT is closer than the static plan on {', '.join(found)} of the prompts."]


def _row(cost: str, row: Report) -> list[str]:
    over = row.get("over_fewer")
    cells = [cost, label(row), f"{row['share']:.0%}", interval(row["psnr"], 1)]
    cells += [interval(row["ssim"], 3), "" if over is None else interval(over, 1)]
    asked = row["as_asked"]
    return [*cells, f"{row['frechet']:.3f}", "" if asked is None else f"{asked:.0%}"]


def _value(entry: Mapping[str, float]) -> str:
    return f"{entry['value']:.1f}"


def _conditions(report: Report) -> str:
    sections, steps = report["sections"], report["model"]["steps"]
    counts = [_count(entries) for entries in sections.values() if entries]
    units = {
        entry.get("unit", "tokens") for entries in sections.values() for entry in entries.values()
    }
    costs = "Costs are counted in computed image tokens, nothing is timed"
    share = "`share` is the image tokens that the blocks ran on, over full resolution's. "
    if units == {"ms"}:
        costs = f"Costs are sums of median step times ({cpu(report)}, {released(report, 'torch')})"
        share = "`share` is the time of the loop over full resolution's. "
    share *= bool(sections.get("order"))
    return (
        f"128 x 128 where not said otherwise; {'; then '.join(counts)}. Where nothing else is "
        "said, captions leave open half or more of what an image shows. Compared with "
        f"{steps} steps at full resolution from the same noise. {costs}; plans were chosen at "
        f"their cost on other prompts. {share}"
        "Values are means over the prompts, intervals are over them."
    )


def _count(entries: Mapping[str, Any]) -> str:
    found: Sequence[tuple[int, int]] = sorted(
        {(len(entry["prompts"]), entry["seeds"]) for entry in entries.values()}
    )
    return ", ".join(f"{prompts} prompts x {seeds} seeds" for prompts, seeds in found)
