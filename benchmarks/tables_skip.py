"""The tables of docs/quality.md from the results of `bench_skip.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_KINDS = {
    "fewer_steps": "fewer fine steps",
    "static": "static plan",
    "ddit": "DDiT alone",
    "teacache": "TeaCache alone",
    "magcache": "MagCache alone",
    "ddit_teacache": "DDiT + TeaCache",
    "ddit_magcache": "DDiT + MagCache",
}
_CLOCKS = {"wall": "", "cpu": " in processor time, since the machine had other work"}
_RIVALS = ("ddit", "teacache", "magcache", "fewer_steps", "static")


def skip(report: Mapping[str, Any]) -> str:
    """One block of rows per SSIM asked for, what they say, and how they were measured."""
    clips = "flicker" in report["fine"]
    columns = ["SSIM asked", "plan", "loop, ms", "speed-up (95%)", "coarse", "reused"]
    columns += ["SSIM (95%)", "PSNR, dB", *(["flicker"] if clips else [])]
    lines = [f"| {' | '.join(columns)} |", f"|--:|---|{'--:|' * (len(columns) - 2)}"]
    lines.append(_row("", "all fine", report["fine"], clips))
    for target in report["targets"]:
        for place, row in enumerate(target["rows"]):
            lines.append(_row("" if place else f"{target['ssim']:g}", row["label"], row, clips))
    said = [_said(target) for target in report["targets"]]
    return "\n".join([*lines, "", *said, "", _conditions(report, clips), ""])


def _row(target: str, name: str, row: Row, clips: bool) -> str:
    speed, ssim = row["speedup"], row["ssim"]
    cells = [
        target,
        name,
        f"{row['loop_seconds']['value'] * 1e3:.0f}",
        f"{speed['value']:.2f}x ({speed['low']:.2f} to {speed['high']:.2f})",
        f"{row['coarse_share']:.0%}",
        f"{row['reused_share']:.0%}",
        f"{ssim['value']:.3f} ({ssim['low']:.3f} to {ssim['high']:.3f})",
        "same" if row["psnr"] is None else f"{row['psnr']['value']:.1f}",
    ]
    if clips:
        cells.append(f"{row['flicker']['value']:.4f}")
    return f"| {' | '.join(cells)} |"


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
        for kind in _RIVALS
        if kind in against
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def _conditions(report: Mapping[str, Any], clips: bool) -> str:
    settings, machine, versions = report["settings"], report["machine"], report["versions"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    size = _size(settings["arguments"])
    frames = " SSIM and PSNR are means over the frames; `flicker` is the mean absolute error of "
    frames += "the change from frame to frame, of 1."
    return (
        f"{size}, {settings['steps']} steps; {len(settings['prompts'])} held-out prompts, "
        f"{settings['repeats']} interleaved rounds after a warm-up; {machine['cpu']}, {threads}, "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}. Plans were chosen on "
        f"{len(settings['search_prompts'])} other prompts as the cheapest of their kind with the "
        f"SSIM asked for. `loop` is the denoising loop of one call{_CLOCKS[settings['clock']]}, "
        "`speed-up` is over all fine, `coarse` and `reused` are shares of the steps; intervals are "
        "over the prompts. In brackets behind an answer: how many times as fast, and the "
        "difference in SSIM."
        f"{frames if clips else ''}"
    )


def _size(arguments: Mapping[str, Any]) -> str:
    parts: Sequence[str] = [
        str(arguments[name]) for name in ("height", "width", "num_frames") if name in arguments
    ]
    return " x ".join(parts)
