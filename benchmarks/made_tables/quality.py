"""The tables of docs/quality.md from the ablations of `bench_quality.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from made_tables.markdown import (
    Report,
    block,
    cpu,
    header,
    interval,
    label,
    line,
    psnr,
    released,
)

Row = Mapping[str, Any]
_COLUMNS = (
    *("", "tokens", "loop, ms", "PSNR, dB", "SSIM (95%)", "Fréchet", "as asked"),
    *("fewer steps, equal time", "static, equal time"),
)
_PATHS = {
    "paper_untrained": "paper, untrained",
    "training_free": "SNR, untrained",
    "paper_trained": "paper, trained",
    "snr_trained": "SNR, trained",
}
_VERDICTS = {
    "yes": "holds",
    "undecided": "undecided",
    "no": "does not hold",
    "unequal cost": "not comparable, as the costs differ",
}


def quality_demo(report: Report) -> str:
    """The tables, what they say of the paper's claims, and how they were measured."""
    tables, steps = report["tables"], report["settings"]["steps"]
    rules = [row for name in ("order", "rho", "statistic") for row in tables.get(name, [])]
    shown = [
        ("Ways to take a coarse step", _adapters(tables.get("adapters", []))),
        (f"Static against dynamic, {steps} steps", _plans(tables.get("static_dynamic", []))),
        ("Claims", _claims(report["claims"])),
    ]
    folded = [
        ("Step counts", _plans(tables.get("steps", []))),
        ("The paper's rule, tau as it is", _plans(tables.get("tau", []))),
        ("The paper's rule, tau found for equal tokens", _plans(rules)),
    ]
    parts = [["![SSIM and feature distance against time, plan by plan](quality_demo.png)"]]
    parts += [[f"**{title}**", "", *part] for title, part in shown if part]
    parts += [_folded(title, part) for title, part in folded if part]
    return block(*parts, [_conditions(report)])


def quality_demo_video(report: Report) -> str:
    """The plans of the table `video`, its claims, and SSIM and PSNR frame by frame."""
    rows = report["tables"]["video"]
    shown = [row for row in rows if row["kind"] != "fewer_steps"]
    by_name = {row["name"]: row for row in rows}
    columns = ["", "tokens", "loop, ms", "PSNR, dB (95%)", "SSIM (95%)", "flicker", "as asked"]
    columns += ["fewer steps, equal time"]
    return block(
        [*header(columns), *(_video_plan(row, by_name) for row in shown)],
        _folded("SSIM of every frame", _frames(shown, "ssim", 3)),
        _folded("PSNR, dB, of every frame", _frames(shown, "psnr", 1)),
        _claims(report["claims"]),
        [_video_conditions(report)],
    )


def _folded(title: str, part: Sequence[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *part, "", "</details>"]


def _video_plan(row: Row, by_name: Mapping[str, Row]) -> str:
    fewer = by_name.get(row.get("fewer_steps", {}).get("equal_time", ""))
    return line(
        (
            label(row),
            *_cost(row),
            "same" if row["psnr"] is None else interval(row["psnr"], 1),
            interval(row["ssim"], 3),
            f"{row['flicker']['value']:.4f}",
            f"{row['correct']['all']['value']:.0%}",
            ""
            if fewer is None
            else f"{fewer['steps']}: {psnr(fewer['psnr'])} / {fewer['ssim']['value']:.3f} / "
            f"{fewer['flicker']['value']:.4f}",
        )
    )


def _cost(row: Row) -> tuple[str, str]:
    return f"{row['tokens_share']:.0%}", f"{row['loop_ms']:.0f}"


def _frames(rows: Sequence[Row], value: str, digits: int) -> list[str]:
    """One line per plan that differs from the reference, one column per frame."""
    lines = header(["", *map(str, range(1, len(rows[0]["frames"]) + 1))])
    for row in rows:
        if row["kind"] != "fine":
            found = [frame[value] for frame in row["frames"]]
            cells = ["same" if one is None else f"{one:.{digits}f}" for one in found]
            lines.append(line([label(row), *cells]))
    return lines


def _plans(rows: Sequence[Row]) -> list[str]:
    """One line per plan, its baselines beside it."""
    by_name = {row["name"]: row for row in rows}
    kept = [row for row in rows if row["kind"] in ("dynamic", "reference")]
    return [*header(_COLUMNS), *(_plan(row, by_name) for row in kept)] if kept else []


def _plan(row: Row, by_name: Mapping[str, Row]) -> str:
    fewer = by_name.get(row.get("fewer_steps", {}).get("equal_time", ""))
    static = by_name.get(row.get("static", ""))
    return line(
        (
            f"{label(row)}{', tau ' + format(row['tau'], '.2g') if 'tau' in row else ''}",
            *_cost(row),
            psnr(row["psnr"]),
            interval(row["ssim"], 3),
            f"{row['frechet']:.3f}",
            f"{row['correct']['all']['value']:.0%}",
            "" if fewer is None else f"{fewer['steps']}: {_fidelity(fewer)}",
            "" if static is None else _fidelity(static),
        )
    )


def _adapters(rows: Sequence[Row]) -> list[str]:
    """One line per plan: PSNR / SSIM / Fréchet distance of every path, and of fewer steps."""
    if not rows:
        return []
    by_name = {row["name"]: row for row in rows}
    plans = list(dict.fromkeys(name.partition("/")[0] for name in by_name if "/" in name))
    paths = [path for path in _PATHS if f"{plans[0]}/{path}" in by_name]
    titles = [_PATHS[path] for path in paths]
    lines = header(["", "tokens", "loop, ms", *titles, "fewer steps, equal time"])
    for plan in plans:
        free = by_name[f"{plan}/training_free"]
        fewer = by_name[free["fewer_steps"]["equal_time"]]
        cells = [label(free).partition(":")[0], *_cost(free)]
        cells += [_fidelity(by_name[f"{plan}/{path}"]) for path in paths]
        lines.append(line([*cells, f"{fewer['steps']}: {_fidelity(fewer)}"]))
    return [*lines, "", "The loop's time is that of the SNR-matched step without adapters."]


def _fidelity(row: Row) -> str:
    return f"{psnr(row['psnr'])} / {row['ssim']['value']:.3f} / {row['frechet']:.3f}"


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per claim: with its difference, or with counts where it was tried several times."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for claim in claims:
        groups.setdefault(claim["claim"], []).append(claim)
    return [
        f"- {text[0].upper()}{text[1:].replace('fewer fine steps', 'fewer steps')}: "
        f"{_verdict(group)}."
        for text, group in groups.items()
    ]


def _verdict(group: Sequence[Mapping[str, Any]]) -> str:
    differences = [claim["difference"] for claim in group]
    if len(group) == 1:
        (only,) = differences
        bounds = f"{only['value']:+.4f} SSIM, {only['low']:+.4f} to {only['high']:+.4f}"
        return f"{_VERDICTS[group[0]['holds']]} ({bounds})"
    verdicts = [claim["holds"] for claim in group]
    counts = [f"{text} in {verdicts.count(key)}" for key, text in _VERDICTS.items()]
    kept = [count for count in counts if not count.endswith(" in 0")]
    values = [difference["value"] for difference in differences]
    return f"{', '.join(kept)} of {len(group)} ({min(values):+.4f} to {max(values):+.4f} SSIM)"


def _conditions(report: Report) -> str:
    settings, references = report["settings"], report["references"]
    halves = references["frechet_halves"]
    scale = "" if halves is None else f" ({halves:.4f} between the references of two seeds)"
    missing = "".join(f" Not measured: {_PATHS[name]}." for name in report["missing"])
    return (
        f"{len(settings['prompts'])} prompts x {settings['seeds']} seeds, {settings['steps']} "
        "steps where not said otherwise; compared with full-resolution images of the same noise "
        f"and step count. {_loop(report)} Three numbers in a cell are PSNR in dB / SSIM / Fréchet. "
        "`Fréchet` is the Fréchet distance on the features of the demo's classifier, not FID"
        f"{scale}; `as asked` the share of images that show all four things that the caption "
        f"names ({references['correct']['all']['value']:.0%} of the full-resolution ones). "
        "Intervals are over prompts; a claim holds where that of the paired difference is above "
        f"0.{missing}"
    )


def _video_conditions(report: Report) -> str:
    settings = report["settings"]
    size = " x ".join(str(settings[name]) for name in ("height", "width", "num_frames"))
    return (
        f"{len(settings['prompts'])} held-out prompts x {settings['seeds']} seed"
        f"{'s' * (settings['seeds'] != 1)}, {size}, {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}; compared with full-resolution videos of the same noise "
        f"and step count. {_loop(report)} PSNR (of frames that differ) and SSIM are means over the "
        "frames, `flicker` is the mean absolute error of the change from frame to frame, of 1; "
        "three numbers in a cell are these three. `as asked`: videos that show all five things "
        "that the caption names. Intervals are over prompts; a claim holds where that of the "
        "paired difference is above 0."
    )


def _loop(report: Report) -> str:
    """What the column `loop` is."""
    return (
        "`loop` is the sum of the median times of its steps, measured in interleaved rounds "
        f"({cpu(report)}, {released(report, 'torch')})."
    )
