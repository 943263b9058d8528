"""The tables of docs/quality.md from records of `bench_study.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from made_tables.markdown import Report, block, header, interval, label, line


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
    lines = header([*columns, "MagCache over half the steps, dB (95%)"])
    for name, entry in entries.items():
        by_kind = {row["kind"]: row for row in entry["levels"]["2"]}
        mag = by_kind.get("magcache")
        cells = [
            name,
            _value(entry["two_seeds"]["psnr"]),
            interval(by_kind["fewer_steps"]["psnr"], 1),
        ]
        cells += (
            ["", ""] if mag is None else [interval(mag["psnr"], 1), interval(mag["over_fewer"], 1)]
        )
        lines.append(line(cells))
    return lines


def _order(name: str, entry: Mapping[str, Any]) -> list[str]:
    """One line per cost and kind of plan."""
    columns = [
        "cost",
        "plan",
        "share",
        "PSNR, dB (95%)",
        "SSIM (95%)",
        "over fewer steps, dB (95%)",
    ]
    lines = [f"**{name}**", "", *header(columns, "--")]
    for level in sorted(entry["levels"], key=float):
        for place, row in enumerate(entry["levels"][level]):
            lines.append(_row("" if place else f"{level}x", row))
    scale = entry["two_seeds"]
    said = (
        f"Two seeds of one prompt: {_value(scale['psnr'])} dB, SSIM {scale['ssim']['value']:.3f}."
    )
    return [*lines, "", said]


def _row(cost: str, row: Report) -> str:
    over = row.get("over_fewer")
    cells = [cost, label(row), f"{row['share']:.0%}", interval(row["psnr"], 1)]
    return line([*cells, interval(row["ssim"], 3), "" if over is None else interval(over, 1)])


def _value(entry: Mapping[str, float]) -> str:
    return f"{entry['value']:.1f}"


def _conditions(report: Report) -> str:
    sections, steps = report["sections"], report["model"]["steps"]
    counts = [_count(entries) for entries in sections.values() if entries]
    share = (
        "`share` is the image tokens that the blocks ran on, over full resolution's. "
        if sections.get("order")
        else ""
    )
    return (
        f"128 x 128 where not said otherwise; {'; then '.join(counts)}. Where nothing else is "
        "said, captions leave open half or more of what an image shows. Compared with "
        f"{steps} steps at full resolution from the same noise. Costs are counted in computed "
        f"image tokens, nothing is timed; plans were chosen at their cost on other prompts. {share}"
        "Values are means over the prompts, intervals are over them."
    )


def _count(entries: Mapping[str, Any]) -> str:
    found: Sequence[tuple[int, int]] = sorted(
        {(len(entry["prompts"]), entry["seeds"]) for entry in entries.values()}
    )
    return ", ".join(f"{prompts} prompts x {seeds} seeds" for prompts, seeds in found)
