"""The tables of docs/quality.md from records of `bench_quality.py --caches`."""

from __future__ import annotations

from collections.abc import Mapping
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

_KINDS = {
    "fewer_steps": "fewer steps",
    "static": "static plan",
    "ddit": "DDiT alone",
    "teacache": "TeaCache alone",
    "magcache": "MagCache alone",
    "ddit_teacache": "DDiT + TeaCache",
    "ddit_magcache": "DDiT + MagCache",
}
_CLOCKS = {"wall": "", "cpu": " in processor time, since the machine had other work"}
_OTHERS = ("ddit", "teacache", "magcache", "fewer_steps", "static")


def caches(report: Report) -> str:
    """One block of rows per SSIM asked for, what they say, and how they were measured."""
    video = "flicker" in report["fine"]
    columns = ["SSIM asked", "plan", "loop, ms", "speed-up (95%)", "coarse", "reused"]
    columns += ["SSIM (95%)", "PSNR, dB", *(["flicker"] if video else [])]
    lines = [*header(columns, ":-"), _row("", "full resolution", report["fine"])]
    for target in report["targets"]:
        for place, row in enumerate(target["rows"]):
            lines.append(_row("" if place else f"{target['ssim']:g}", label(row), row))
    said = [_said(target) for target in report["targets"]]
    return block(lines, said, [_conditions(report, video)])


def _row(target: str, name: str, row: Report) -> str:
    cells = [
        target,
        name,
        f"{row['loop_seconds']['value'] * 1e3:.0f}",
        interval(row["speedup"], 2, "x"),
        f"{row['coarse_share']:.0%}",
        f"{row['reused_share']:.0%}",
        interval(row["ssim"], 3),
        psnr(row["psnr"]),
    ]
    return line([*cells, f"{row['flicker']['value']:.4f}"] if "flicker" in row else cells)


def _said(target: Mapping[str, Any]) -> str:
    """One line per target: is the combination faster than either alone, and than the others?"""
    parts = [
        f"{_KINDS[verdict['kind']]} {_answer(verdict)}{_against(verdict['against'])}"
        for verdict in target["verdicts"]
    ]
    return f"- At {target['ssim']:g}, faster than either alone: {'; '.join(parts)}."


def _answer(verdict: Mapping[str, Any]) -> str:
    reason = f", as {verdict['reason']}" if "reason" in verdict else ""
    return f"**{verdict['either_alone']}**{reason}"


def _against(against: Mapping[str, Any]) -> str:
    """Time and SSIM against every other kind."""
    parts = [
        f"{against[kind]['speed']['value']:.2f}x of {_KINDS[kind].removesuffix(' alone')}, "
        f"{against[kind]['ssim']['value']:+.3f}"
        for kind in _OTHERS
        if kind in against
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def _conditions(report: Report, video: bool) -> str:
    settings, arguments = report["settings"], report["settings"]["arguments"]
    sides = [str(arguments[n]) for n in ("height", "width", "num_frames") if n in arguments]
    frames = " SSIM and PSNR are means over the frames; `flicker` is the mean absolute error of "
    frames += "the change from frame to frame, of 1."
    return (
        f"{' x '.join(sides)}, {settings['steps']} steps; {len(settings['prompts'])} held-out "
        f"prompts, {settings['repeats']} interleaved rounds after a warm-up; {cpu(report)}, "
        f"{released(report, 'torch', 'diffusers')}. Plans were chosen on "
        f"{len(settings['search_prompts'])} other prompts as the cheapest of their kind with the "
        f"SSIM asked for. `loop` is the denoising loop of one call{_CLOCKS[settings['clock']]}, "
        "`speed-up` is over full resolution, `coarse` and `reused` are shares of the steps; "
        "intervals are over the prompts. In brackets behind an answer: how many times as fast, and "
        "the difference in SSIM."
        f"{frames if video else ''}"
    )
