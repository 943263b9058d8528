"""The quality tables of docs/quality.md, from the results of `bench_quality.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_COLUMNS = (
    "",
    "tokens",
    "loop, ms",
    "PSNR, dB",
    "SSIM (95%)",
    "Fréchet",
    "as asked",
    "fewer fine steps, equal time",
    "static, equal time",
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


def quality_demo(report: Mapping[str, Any]) -> str:
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
    lines = [line for title, part in shown if part for line in (f"**{title}**", "", *part, "")]
    for title, part in folded:
        if part:
            lines += [f"<details><summary>{title}</summary>", "", *part, "", "</details>", ""]
    plot = "![SSIM and feature distance against time, plan by plan](quality_demo.png)"
    return "\n".join([plot, "", *lines, _conditions(report), ""])


def quality_demo_video(report: Mapping[str, Any]) -> str:
    """The plans of the table `video`, its claims, and SSIM and PSNR frame by frame."""
    rows = report["tables"]["video"]
    shown = [row for row in rows if row["kind"] != "fewer_steps"]
    by_name = {row["name"]: row for row in rows}
    columns = ["", "tokens", "loop, ms", "PSNR, dB (95%)", "SSIM (95%)", "flicker", "as asked"]
    columns += ["fewer fine steps, equal time"]
    lines = [*_header(columns), *(_clip_plan(row, by_name) for row in shown)]
    for title, value, digits in (("SSIM", "ssim", 3), ("PSNR, dB,", "psnr", 1)):
        lines += ["", f"<details><summary>{title} of every frame</summary>", ""]
        lines += [*_frames(shown, value, digits), "", "</details>"]
    return "\n".join([*lines, "", *_claims(report["claims"]), "", _clip_conditions(report), ""])


def _clip_plan(row: Row, by_name: Mapping[str, Row]) -> str:
    fewer = by_name.get(row.get("fewer_steps", {}).get("equal_time", ""))
    cells = (
        row["label"],
        f"{row['tokens_share']:.0%}",
        f"{row['loop_ms']:.0f}",
        "same" if row["psnr"] is None else _interval(row["psnr"], 1),
        _interval(row["ssim"], 3),
        f"{row['flicker']['value']:.4f}",
        f"{row['correct']['all']['value']:.0%}",
        ""
        if fewer is None
        else f"{fewer['steps']}: {_psnr(fewer)} / {fewer['ssim']['value']:.3f} / "
        f"{fewer['flicker']['value']:.4f}",
    )
    return f"| {' | '.join(cells)} |"


def _frames(rows: Sequence[Row], value: str, digits: int) -> list[str]:
    """One line per plan that differs from all fine, one column per frame."""
    count = len(rows[0]["frames"])
    lines = _header(["", *map(str, range(1, count + 1))])
    for row in rows:
        if row["kind"] != "fine":
            found = [frame[value] for frame in row["frames"]]
            cells = ["same" if one is None else f"{one:.{digits}f}" for one in found]
            lines.append(f"| {' | '.join([row['label'], *cells])} |")
    return lines


def _interval(entry: Mapping[str, float | None], digits: int) -> str:
    """A mean; its bounds too, where more than one prompt counts."""
    value, *bounds = (
        "" if entry[name] is None else f"{entry[name]:.{digits}f}"
        for name in ("value", "low", "high")
    )
    return f"{value} ({' to '.join(bounds)})" if all(bounds) else value


def _header(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]


def _plans(rows: Sequence[Row]) -> list[str]:
    """One line per plan, its rivals beside it."""
    by_name = {row["name"]: row for row in rows}
    kept = [row for row in rows if row["kind"] in ("dynamic", "reference")]
    if not kept:
        return []
    return [*_header(_COLUMNS), *(_plan(row, by_name) for row in kept)]


def _plan(row: Row, by_name: Mapping[str, Row]) -> str:
    fewer = by_name.get(row.get("fewer_steps", {}).get("equal_time", ""))
    static = by_name.get(row.get("static", ""))
    tau = f", tau {row['tau']:.2g}" if "tau" in row else ""
    cells = (
        f"{row['label']}{tau}",
        f"{row['tokens_share']:.0%}",
        f"{row['loop_ms']:.0f}",
        _psnr(row),
        _interval(row["ssim"], 3),
        f"{row['frechet']:.3f}",
        f"{row['correct']['all']['value']:.0%}",
        "" if fewer is None else f"{fewer['steps']}: {_closeness(fewer)}",
        "" if static is None else _closeness(static),
    )
    return f"| {' | '.join(cells)} |"


def _psnr(row: Row) -> str:
    return "same" if row["psnr"] is None else f"{row['psnr']['value']:.1f}"


def _adapters(rows: Sequence[Row]) -> list[str]:
    """One line per plan: PSNR / SSIM / Fréchet distance of every path, and of fewer steps."""
    if not rows:
        return []
    by_name = {row["name"]: row for row in rows}
    plans = list(dict.fromkeys(name.partition("/")[0] for name in by_name if "/" in name))
    paths = [path for path in _PATHS if f"{plans[0]}/{path}" in by_name]
    titles = [_PATHS[path] for path in paths]
    header = ["", "tokens", "loop, ms", *titles, "fewer fine steps, equal time"]
    lines = _header(header)
    for plan in plans:
        free = by_name[f"{plan}/training_free"]
        rival = by_name[free["fewer_steps"]["equal_time"]]
        cells = [
            free["label"].partition(":")[0],
            f"{free['tokens_share']:.0%}",
            f"{free['loop_ms']:.0f}",
            *(_closeness(by_name[f"{plan}/{path}"]) for path in paths),
            f"{rival['steps']}: {_closeness(rival)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "The loop's time is that of the SNR-matched step without adapters.",
    ]


def _closeness(row: Row) -> str:
    return f"{_psnr(row)} / {row['ssim']['value']:.3f} / {row['frechet']:.3f}"


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per claim: with its difference, or with counts where it was tried several times."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for claim in claims:
        groups.setdefault(claim["claim"], []).append(claim)
    return [f"- {text[0].upper()}{text[1:]}: {_verdict(group)}." for text, group in groups.items()]


def _verdict(group: Sequence[Mapping[str, Any]]) -> str:
    differences = [claim["difference"] for claim in group]
    if len(group) == 1:
        (only,) = differences
        interval = f"{only['value']:+.4f} SSIM, {only['low']:+.4f} to {only['high']:+.4f}"
        return f"{_VERDICTS[group[0]['holds']]} ({interval})"
    verdicts = [claim["holds"] for claim in group]
    counts = [f"{text} in {verdicts.count(key)}" for key, text in _VERDICTS.items()]
    kept = [count for count in counts if not count.endswith(" in 0")]
    values = [difference["value"] for difference in differences]
    return f"{', '.join(kept)} of {len(group)} ({min(values):+.4f} to {max(values):+.4f} SSIM)"


def _conditions(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    halves = report["references"]["frechet_halves"]
    scale = "" if halves is None else f" ({halves:.4f} between all-fine pictures of two seeds)"
    missing = "".join(f" Not measured: {_PATHS[name]}." for name in report["missing"])
    return (
        f"{len(settings['prompts'])} prompts x {settings['seeds']} seeds, {settings['steps']} "
        "steps where not said otherwise; compared with all-fine pictures of the same noise and "
        f"step count. {_times(report)} Three numbers in a cell are PSNR in dB / SSIM / Fréchet. "
        "`Fréchet` is the Fréchet distance on the features of the demo's classifier, not FID"
        f"{scale}; `as asked` the share of pictures that show all four things that the caption "
        f"names ({report['references']['correct']['all']['value']:.0%} of the all-fine ones). "
        "Intervals are over prompts; a claim holds where that of the paired difference is above "
        f"0.{missing}"
    )


def _clip_conditions(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    size = " x ".join(str(settings[name]) for name in ("height", "width", "num_frames"))
    return (
        f"{len(settings['prompts'])} held-out prompts x {settings['seeds']} seed"
        f"{'s' * (settings['seeds'] != 1)}, {size}, {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}; compared with all-fine clips of the same noise and step "
        f"count. {_times(report)} PSNR (of frames that differ) and SSIM are means over the "
        "frames, `flicker` is the mean absolute error of the change from frame to frame, of 1; "
        "three numbers in a cell are these three. `as asked`: clips that show all five things that "
        "the caption names. Intervals are over prompts; a claim holds where that of the paired "
        "difference is above 0."
    )


def _times(report: Mapping[str, Any]) -> str:
    """What the column `loop` is."""
    machine = report["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return (
        "`loop` is the sum of the median times of its steps, measured in interleaved rounds "
        f"({machine['cpu']}, {threads}, torch {report['versions']['torch']})."
    )
