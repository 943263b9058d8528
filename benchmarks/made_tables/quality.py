"""The tables of docs/quality.md from records of `bench_quality.py` and `bench_mixed.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from made_tables.markdown import Report, block, cpu, interval, label, psnr, released, table

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
_CACHE_KINDS = {
    "fewer_steps": "fewer steps",
    "static": "static plan",
    "ddit": "DDiT alone",
    "teacache": "TeaCache alone",
    "magcache": "MagCache alone",
    "ddit_teacache": "DDiT + TeaCache",
    "ddit_magcache": "DDiT + MagCache",
}
_OTHERS = ("ddit", "teacache", "magcache", "fewer_steps", "static")
_MIXED_KINDS = ("fine", "fewer_steps", "static", "dynamic", "mixed", "adapted", "control")
_QUESTIONS = {
    "any_time": "closer than every other plan in no more time",
    "any_tokens": "closer than every other plan on no more tokens",
    "coarse_time": "closer than static and dynamic plans in no more time",
    "coarse_tokens": "closer than static and dynamic plans on no more tokens",
    "control": "closer than the same with regions by chance",
    "untrained": "closer than the same without it",
}


def ablations(report: Report) -> str:
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
    plot = "![SSIM and feature distance against time, plan by plan](quality_study.png)"
    parts = [[plot]] if "static_dynamic" in tables else []
    parts += [[f"**{title}**", "", *part] for title, part in shown if part]
    parts += [_folded(title, part) for title, part in folded if part]
    return block(*parts, [_conditions(report)])


def _folded(title: str, part: Sequence[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *part, "", "</details>"]


def _cost(row: Row) -> tuple[str, str]:
    return f"{row['tokens_share']:.0%}", f"{row['loop_ms']:.0f}"


def _plans(rows: Sequence[Row]) -> list[str]:
    """One line per plan, its baselines beside it."""
    by_name = {row["name"]: row for row in rows}
    kept = [row for row in rows if row["kind"] in ("dynamic", "reference")]
    return table(_COLUMNS, [_plan(row, by_name) for row in kept]) if kept else []


def _plan(row: Row, by_name: Mapping[str, Row]) -> tuple[str, ...]:
    fewer = by_name.get(row.get("fewer_steps", {}).get("equal_time", ""))
    static = by_name.get(row.get("static", ""))
    return (
        f"{label(row)}{', tau ' + format(row['tau'], '.2g') if 'tau' in row else ''}",
        *_cost(row),
        psnr(row["psnr"]),
        interval(row["ssim"], 3),
        f"{row['frechet']:.3f}",
        f"{row['correct']['all']['value']:.0%}",
        "" if fewer is None else f"{fewer['steps']}: {_fidelity(fewer)}",
        "" if static is None else _fidelity(static),
    )


def _adapters(rows: Sequence[Row]) -> list[str]:
    """One line per plan: PSNR / SSIM / Fréchet distance of every path, and of fewer steps."""
    if not rows:
        return []
    by_name = {row["name"]: row for row in rows}
    plans = list(dict.fromkeys(name.partition("/")[0] for name in by_name if "/" in name))
    paths = [path for path in _PATHS if f"{plans[0]}/{path}" in by_name]
    lines = []
    for plan in plans:
        free = by_name[f"{plan}/training_free"]
        fewer = by_name[free["fewer_steps"]["equal_time"]]
        cells = [label(free).partition(":")[0], *_cost(free)]
        cells += [_fidelity(by_name[f"{plan}/{path}"]) for path in paths]
        lines.append([*cells, f"{fewer['steps']}: {_fidelity(fewer)}"])
    columns = ["", "tokens", "loop, ms", *(_PATHS[path] for path in paths)]
    shown = table([*columns, "fewer steps, equal time"], lines)
    return [*shown, "", "The loop's time is that of the SNR-matched step without adapters."]


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
    values = [difference["value"] for difference in differences]
    return f"{_counts(group)} ({min(values):+.4f} to {max(values):+.4f} SSIM)"


def _counts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(verdict["holds"] for verdict in verdicts)
    found = (f"{text} in {counts[key]}" for key, text in _VERDICTS.items() if counts[key])
    return f"{', '.join(found)} of {len(verdicts)}"


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
        f"{scale}; `as asked` the share of images that show all that the caption says "
        f"({references['correct']['all']['value']:.0%} of the full-resolution ones). "
        "Intervals are over prompts; a claim holds where that of the paired difference is above "
        f"0.{missing}"
    )


def _loop(report: Report) -> str:
    """What the column `loop` is."""
    return (
        "`loop` is the sum of the median times of its steps, measured in interleaved rounds "
        f"({cpu(report)}, {released(report, 'torch')})."
    )


def caches(report: Report) -> str:
    """One block of rows per SSIM asked for, what they say, and how they were measured."""
    columns = ["SSIM asked", "plan", "loop, ms", "speed-up (95%)", "coarse", "reused"]
    columns += ["SSIM (95%)", "PSNR, dB"]
    rows = [_cache_row("", "full resolution", report["fine"])]
    for target in report["targets"]:
        for place, row in enumerate(target["rows"]):
            rows.append(_cache_row("" if place else f"{target['ssim']:g}", label(row), row))
    said = [_cache_answers(target) for target in report["targets"]]
    return block(table(columns, rows, ":-"), said, [_cache_conditions(report)])


def _cache_row(target: str, name: str, row: Report) -> tuple[str, ...]:
    return (
        target,
        name,
        f"{row['loop_seconds']['value'] * 1e3:.0f}",
        interval(row["speedup"], 2, "x"),
        f"{row['coarse_share']:.0%}",
        f"{row['reused_share']:.0%}",
        interval(row["ssim"], 3),
        psnr(row["psnr"]),
    )


def _cache_answers(target: Mapping[str, Any]) -> str:
    """One line per target: is the combination faster than either alone, and than the others?"""
    parts = [
        f"{_CACHE_KINDS[verdict['kind']]} {_answer(verdict)}{_against(verdict['against'])}"
        for verdict in target["verdicts"]
    ]
    return f"- At {target['ssim']:g}, faster than either alone: {'; '.join(parts)}."


def _answer(verdict: Mapping[str, Any]) -> str:
    reason = f", as {verdict['reason']}" if "reason" in verdict else ""
    return f"**{verdict['either_alone']}**{reason}"


def _against(against: Mapping[str, Any]) -> str:
    """Time and SSIM against every other kind."""
    parts = [
        f"{against[kind]['speed']['value']:.2f}x of {_CACHE_KINDS[kind].removesuffix(' alone')}, "
        f"{against[kind]['ssim']['value']:+.3f}"
        for kind in _OTHERS
        if kind in against
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def _cache_conditions(report: Report) -> str:
    settings, arguments = report["settings"], report["settings"]["arguments"]
    return (
        f"{arguments['height']} x {arguments['width']}, {settings['steps']} steps; "
        f"{len(settings['prompts'])} held-out prompts, "
        f"{settings['repeats']} interleaved rounds after a warm-up; {cpu(report)}, "
        f"{released(report, 'torch', 'diffusers')}. Plans were chosen on "
        f"{len(settings['search_prompts'])} other prompts as the cheapest of their kind with the "
        f"SSIM asked for. `loop` is the denoising loop of one call, `speed-up` is over "
        "full resolution, `coarse` and `reused` are shares of the steps; "
        "intervals are over the prompts. In brackets behind an answer: how many times as fast, and "
        "the difference in SSIM."
    )


def mixed(report: Report) -> str:
    """Of each section its rows and the verdicts; details where every row is of one question."""
    parts: list[Iterable[str]] = []
    for section in report["sections"].values():
        title = (
            f"The study model, guidance {section['scale']:g}, captions that say little: "
            f"{section['steps']} steps, {len(section['prompts'])} prompts"
        )
        parts += [[f"**{title}**"], _mixed_rows(section)]
        if section["verdicts"]:
            parts.append(_mixed_claims(section))
    return block(*parts, [_mixed_conditions(report)])


def _mixed_rows(section: Report) -> list[str]:
    columns = ["plan", "tokens", "loop, ms", "speed-up (95%)", "PSNR, dB (95%)", "SSIM", "features"]
    rows = sorted(section["rows"], key=lambda row: _MIXED_KINDS.index(row["kind"]))
    return table(columns, [_mixed_row(section, row) for row in rows])


def _mixed_row(section: Report, row: Report) -> list[str]:
    whole = section["image_tokens"] * section["steps"]
    measured = ["same", "", ""]
    if row["psnr"] is not None:
        measured = [interval(row["psnr"], 1), f"{row['ssim']['value']:.3f}"]
        measured += [f"{row['features']['value']:.4f}"]
    return [
        label(row),
        f"{row['tokens'] / whole:.0%}",
        f"{row['loop_ms']['value']:.0f}",
        interval(row["speedup"], 2, "x"),
        *measured,
    ]


def _mixed_claims(section: Report) -> list[str]:
    kinds = {row["name"]: row["kind"] for row in section["rows"]}
    found = []
    for kind, name in (("mixed", "Mixed"), ("adapted", "Mixed by the adapter")):
        own = [entry for entry in section["verdicts"] if kinds[entry["name"]] == kind]
        for key, words in _QUESTIONS.items():
            if rivals := [entry[key] for entry in own if entry.get(key)]:
                found.append(f"- {name}, {words}: {_counted(rivals)}.")
    return found


def _counted(verdicts: Sequence[Report]) -> str:
    differences = [verdict["psnr"]["value"] for verdict in verdicts]
    return f"{_counts(verdicts)} ({min(differences):+.1f} to {max(differences):+.1f} dB)"


def _mixed_conditions(report: Report) -> str:
    return (
        "Held-out prompts; the compiled model, plans taking turns prompt by prompt; "
        f"{cpu(report)}, {released(report, 'torch')}. "
        "`loop` is processor time of the denoising loop, `features` the mean squared distance of "
        "the demo classifier's normalised maps. Differences are in dB of PSNR, prompt by prompt; a "
        "claim holds where their 95% interval is above 0."
    )
