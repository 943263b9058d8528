"""The tables of docs/quality.md from the record of `bench_mixed.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from made_tables.markdown import Report, block, cpu, header, interval, label, line, released

_KINDS = ("fine", "fewer_steps", "static", "dynamic", "mixed", "control", "oracle")
_TITLES = {
    "captions": "Captions that say all",
    "open": "Captions that say little, guided",
    "large": "256 x 256, which the model was not trained on",
}
_QUESTIONS = {
    "any_time": "closer than every other plan in no more time",
    "any_tokens": "closer than every other plan on no more tokens",
    "coarse_time": "closer than static and dynamic plans in no more time",
    "coarse_tokens": "closer than static and dynamic plans on no more tokens",
    "control": "closer than the same with regions by chance",
}


def mixed(report: Report) -> str:
    """Of each section its rows and the verdicts; details where every row is of one question."""
    parts: list[Iterable[str]] = []
    for section in report["sections"].values():
        parts += [[f"**{_title(section)}**"], _rows(section), _said(section)]
    return block(*parts, [_conditions(report)])


def _title(section: Report) -> str:
    title = _TITLES.get(section["condition"], section["condition"])
    return f"{title}: {section['steps']} steps, {len(section['prompts'])} prompts"


def _rows(section: Report) -> list[str]:
    columns = ["plan", "tokens", "loop, ms", "speed-up (95%)", "PSNR, dB (95%)", "SSIM", "features"]
    rows = sorted(section["rows"], key=lambda row: _KINDS.index(row["kind"]))
    return [*header(columns), *(_row(section, row) for row in rows)]


def _row(section: Report, row: Report) -> str:
    whole = section["image_tokens"] * section["steps"]
    measured = ["same", "", ""]
    if row["psnr"] is not None:
        measured = [interval(row["psnr"], 1), f"{row['ssim']['value']:.3f}"]
        measured += [f"{row['features']['value']:.4f}"]
    return line(
        [
            label(row),
            f"{row['tokens'] / whole:.0%}",
            f"{row['loop_ms']['value']:.0f}",
            interval(row["speedup"], 2, "x"),
            *measured,
        ]
    )


def _said(section: Report) -> list[str]:
    kinds = {row["name"]: row["kind"] for row in section["rows"]}
    mixed = [entry for entry in section["verdicts"] if kinds[entry["name"]] == "mixed"]
    return [
        f"- Mixed, {words}: {_counted([entry[key] for entry in mixed if entry[key]])}."
        for key, words in _QUESTIONS.items()
    ]


def _counted(verdicts: Sequence[Report]) -> str:
    if not verdicts:
        return "nothing to compare with"
    counts = Counter(verdict["holds"] for verdict in verdicts)
    words = {"yes": "holds", "undecided": "undecided", "no": "does not hold"}
    found = ", ".join(f"{words[key]} in {counts[key]}" for key in words if counts[key])
    differences = [verdict["psnr"]["value"] for verdict in verdicts]
    extent = f"{min(differences):+.1f} to {max(differences):+.1f} dB"
    return f"{found} of {len(verdicts)} ({extent})"


def _conditions(report: Report) -> str:
    sections = list(report["sections"].values())
    scales = {section["scale"] for section in sections} - {None}
    guided = f", true guidance {max(scales):g} where guided" if scales else ""
    return (
        f"Held-out prompts{guided}; eager PyTorch, all plans by the "
        f"same code, taking turns prompt by prompt; {cpu(report)}, {released(report, 'torch')}. "
        "`loop` is processor time of the denoising loop, `features` the mean squared distance of "
        "the demo classifier's normalised maps. Differences are in dB of PSNR, prompt by prompt; a "
        "claim holds where their 95% interval is above 0. `control` plans pick regions by nothing, "
        "and `oracle` knows what a whole step at p would change."
    )
